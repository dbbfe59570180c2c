package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"

	"github.com/rogpeppe/go-internal/testscript"
)

// gitRepositories serves those below a directory over smart http and puts the server's URL into $GIT.
func gitRepositories(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: git-server DIR")
	}
	handler, err := gitBackend(ts.MkAbs(args[0]))
	ts.Check(err)
	server := httptest.NewServer(handler)
	ts.Defer(server.Close)
	ts.Setenv("GIT", server.URL)
}

// httpFiles serves the files of a directory, puts its URL into $HTTP, and appends a line for each request that it
// answered with a file to DIR.log: "GET /name".
func httpFiles(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: http-server DIR")
	}
	dir := ts.MkAbs(args[0])
	log, err := os.OpenFile(dir+".log", os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	ts.Check(err)
	files := http.FileServer(http.Dir(dir))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if st, err := os.Stat(filepath.Join(dir, filepath.FromSlash(r.URL.Path))); err == nil {
			w.Header().Set("ETag", fmt.Sprintf("%q", fmt.Sprintf("%x-%x", st.ModTime().UnixNano(), st.Size())))
		}
		answer := &recorder{ResponseWriter: w}
		files.ServeHTTP(answer, r)
		if r.Method == http.MethodGet && answer.status != http.StatusNotModified {
			fmt.Fprintln(log, r.Method, r.URL.Path)
		}
	}))
	ts.Defer(func() {
		server.Close()
		log.Close()
	})
	ts.Setenv("HTTP", server.URL)
}

type recorder struct {
	http.ResponseWriter
	status int
}

func (r *recorder) WriteHeader(status int) {
	r.status = status
	r.ResponseWriter.WriteHeader(status)
}
