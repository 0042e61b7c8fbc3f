// SPDX-License-Identifier: Apache-2.0

// Package backend is the todo list's store: a few todos in memory behind HTTP.
package backend

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
)

// maxTodos bounds the list, maxLength one todo in bytes.
const (
	maxTodos  = 1000
	maxLength = 1024
)

// Store is the list. Make it with New.
type Store struct {
	mu    sync.Mutex
	todos []string
}

// New returns a list with some todos in it.
func New() *Store {
	return &Store{todos: []string{"read the article", "measure the river", "control the river"}}
}

// Handler serves GET /todos/ (the list as JSON), POST /todos/NAME (adds one) and DELETE /todos/NAME.
func (s *Store) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /todos/{$}", s.list)
	mux.HandleFunc("POST /todos/{todo}", s.add)
	mux.HandleFunc("DELETE /todos/{todo}", s.remove)
	return mux
}

func (s *Store) list(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	todos := slices.Clone(s.todos)
	s.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(todos) // the client is gone: nobody to tell
}

var errFull = errors.New("the list is full")

func (s *Store) add(w http.ResponseWriter, r *http.Request) {
	todo := strings.TrimSpace(r.PathValue("todo"))
	if todo == "" || len(todo) > maxLength {
		http.Error(w, fmt.Sprintf("todo: want 1 to %d bytes", maxLength), http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.todos) >= maxTodos {
		http.Error(w, errFull.Error(), http.StatusInsufficientStorage)
		return
	}
	s.todos = append(s.todos, todo)
	w.WriteHeader(http.StatusCreated)
}

func (s *Store) remove(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.Index(s.todos, r.PathValue("todo"))
	if i < 0 {
		http.Error(w, "no such todo", http.StatusNotFound)
		return
	}
	s.todos = slices.Delete(s.todos, i, i+1)
}
