// SPDX-License-Identifier: Apache-2.0

// Package ui is the todo list's front: a page that shows what the backend holds.
package ui

import (
	"context"
	"encoding/json"
	"fmt"
	"html/template"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// Server serves the page. Backend is the backend's address, such as http://todobackend:8080.
type Server struct {
	Backend string
	// Stress is how long /stress/ burns CPU; the article measured about 3 s.
	Stress time.Duration
	Client *http.Client
}

var page = template.Must(template.New("page").Parse(`<!DOCTYPE html>
<html><head><title>Schönste aller Todo Listen</title></head>
<body><h1>Todos</h1>
<ul>{{range .}}<li>{{.}}</li>{{end}}</ul>
<form method="post" action="/"><input name="todo"><button>Add</button></form>
</body></html>
`))

// Handler serves / (the page; POST adds a todo), /todos (the list as JSON) and /stress/ (burns CPU, then redirects to /).
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", s.show)
	mux.HandleFunc("POST /{$}", s.add)
	mux.HandleFunc("GET /todos", s.list)
	mux.HandleFunc("GET /stress/", s.stress)
	return mux
}

func (s *Server) todos(ctx context.Context) ([]string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.Backend+"/todos/", nil)
	if err != nil {
		return nil, err
	}
	resp, err := s.Client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("backend answered %s", resp.Status)
	}
	var todos []string
	if err := json.NewDecoder(http.MaxBytesReader(nil, resp.Body, 4<<20)).Decode(&todos); err != nil {
		return nil, fmt.Errorf("backend's answer: %w", err)
	}
	return todos, nil
}

func (s *Server) show(w http.ResponseWriter, r *http.Request) {
	todos, err := s.todos(r.Context())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	_ = page.Execute(w, todos) // the client is gone: nobody to tell
}

func (s *Server) list(w http.ResponseWriter, r *http.Request) {
	todos, err := s.todos(r.Context())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(todos)
}

func (s *Server) add(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, 4096)
	todo := strings.TrimSpace(r.FormValue("todo"))
	if todo == "" {
		http.Error(w, "todo: want a text", http.StatusBadRequest)
		return
	}
	req, err := http.NewRequestWithContext(r.Context(), http.MethodPost, s.Backend+"/todos/"+url.PathEscape(todo), nil)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	resp, err := s.Client.Do(req)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		http.Error(w, "backend answered "+resp.Status, http.StatusBadGateway)
		return
	}
	http.Redirect(w, r, "/", http.StatusSeeOther)
}

func (s *Server) stress(w http.ResponseWriter, r *http.Request) {
	x := uint64(1)
	for end := time.Now().Add(s.Stress); time.Now().Before(end) && r.Context().Err() == nil; {
		for range 1 << 16 {
			x = x*6364136223846793005 + 1442695040888963407
		}
	}
	w.Header().Set("X-Stress", fmt.Sprint(x)) // the result is used, so that the loop stays
	http.Redirect(w, r, "/", http.StatusFound)
}
