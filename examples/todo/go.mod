module github.com/weirmesh/weir/examples/todo

go 1.26
