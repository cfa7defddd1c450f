// Stub endpoints and load for the gateway's benchmarks: not in Python, so that neither waits for the other's language.
//
//	loadgen stub -listen 9001,delay=10ms,frames=20,pace=2ms -listen 9002 -s3 9000
//	loadgen load -target http://127.0.0.1:8080/v1/chat/completions -connections 32 -rate 300 -seconds 5
//
// Needs the standard library alone, of Go 1.19 or newer.
package main

import (
	"fmt"
	"os"
	"strings"
)

func main() {
	modes := map[string]func([]string){"stub": stub, "load": load}
	if len(os.Args) < 2 || modes[os.Args[1]] == nil {
		fail("wanted a mode, stub or load, saw %q", strings.Join(os.Args[1:], " "))
	}
	modes[os.Args[1]](os.Args[2:])
}

func fail(format string, values ...interface{}) {
	fmt.Fprintf(os.Stderr, "loadgen: "+format+"\n", values...)
	os.Exit(2)
}

// many is a flag that may be given several times.
type many []string

func (m *many) String() string { return strings.Join(*m, " ") }

func (m *many) Set(value string) error {
	*m = append(*m, value)
	return nil
}
