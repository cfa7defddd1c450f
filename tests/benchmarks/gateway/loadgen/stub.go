package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// text is every stub's answer: about 2 KB with what a careless proxy spoils.
var text = strings.Repeat("The consignment waits in Gdańsk for \"form 12\";\nits keeper wants 47.50 € a day. ", 23)

var whole = func() []byte {
	body, err := json.Marshal(map[string]interface{}{
		"id": "chatcmpl-stub", "object": "chat.completion", "created": 1700000000, "model": "stub-1",
		"system_fingerprint": "fp_stub",
		"choices": []interface{}{map[string]interface{}{
			"index": 0, "message": map[string]interface{}{"role": "assistant", "content": text},
			"logprobs": nil, "finish_reason": "stop",
		}},
		"usage": map[string]int{"prompt_tokens": 480, "completion_tokens": 470, "total_tokens": 950},
	})
	if err != nil {
		panic(err)
	}
	return body
}()

// an endpoint behaves as its listen flag says.
type endpoint struct {
	delay, pace time.Duration
	frames      int
	calls       int64
	streams     int64
}

func stub(arguments []string) {
	flags := flag.NewFlagSet("stub", flag.ExitOnError)
	var listen many
	flags.Var(&listen, "listen", "PORT[,delay=10ms][,frames=20][,pace=2ms]; may be given several times")
	s3 := flags.Int("s3", 0, "port of an S3 that takes and forgets everything, and counts its puts; 0: none")
	flags.Parse(arguments)
	if *s3 != 0 {
		go serve(strconv.Itoa(*s3), &bucket{})
	}
	for _, value := range listen {
		port, end := parseEndpoint(value)
		go serve(port, end)
	}
	select {}
}

func serve(port string, handler http.Handler) {
	listener, err := net.Listen("tcp", "127.0.0.1:"+port)
	if err != nil {
		fail("%v", err)
	}
	fail("%v", http.Serve(listener, handler))
}

func parseEndpoint(value string) (string, *endpoint) {
	parts, end := strings.Split(value, ","), &endpoint{frames: 20, pace: 2 * time.Millisecond}
	for _, part := range parts[1:] {
		name, given, _ := strings.Cut(part, "=")
		var err error
		switch name {
		case "delay":
			end.delay, err = time.ParseDuration(given)
		case "pace":
			end.pace, err = time.ParseDuration(given)
		case "frames":
			end.frames, err = strconv.Atoi(given)
		default:
			err = fmt.Errorf("wanted delay, frames or pace, saw %q", name)
		}
		if err != nil {
			fail("-listen %s: %v", value, err)
		}
	}
	return parts[0], end
}

func (e *endpoint) ServeHTTP(out http.ResponseWriter, in *http.Request) {
	switch {
	case strings.HasSuffix(in.URL.Path, "/chat/completions"):
		e.answer(out, in)
	case in.URL.Path == "/stats":
		fmt.Fprintf(out, `{"calls": %d, "streams": %d}`, atomic.LoadInt64(&e.calls), atomic.LoadInt64(&e.streams))
	case strings.HasSuffix(in.URL.Path, "/models"):
		out.Header().Set("Content-Type", "application/json")
		io.WriteString(out, `{"object": "list", "data": [{"id": "stub", "object": "model", "created": 0, "owned_by": "stub"}]}`)
	case in.Method == http.MethodGet: // what routers ask to know if a worker is well
		out.Header().Set("Content-Type", "application/json")
		io.WriteString(out, `{}`)
	default:
		http.NotFound(out, in)
	}
}

func (e *endpoint) answer(out http.ResponseWriter, in *http.Request) {
	began := time.Now()
	asked, err := io.ReadAll(in.Body)
	if err != nil {
		http.Error(out, err.Error(), http.StatusBadRequest)
		return
	}
	atomic.AddInt64(&e.calls, 1)
	time.Sleep(e.delay - time.Since(began))
	if isTrue(asked, "stream") {
		atomic.AddInt64(&e.streams, 1)
		e.stream(out, isTrue(asked, "include_usage"))
		return
	}
	out.Header().Set("Content-Type", "application/json")
	out.Header().Set("Content-Length", strconv.Itoa(len(whole)))
	out.Write(whole)
}

func isTrue(body []byte, name string) bool {
	return bytes.Contains(body, []byte(`"`+name+`":true`)) || bytes.Contains(body, []byte(`"`+name+`": true`))
}

const chunk = `data: {"id":"chatcmpl-stub","object":"chat.completion.chunk","created":1700000000,"model":"stub-1",`

// stream says in each frame its number and when it was written, so that a reader sees order and delay.
func (e *endpoint) stream(out http.ResponseWriter, usage bool) {
	out.Header().Set("Content-Type", "text/event-stream")
	flush := out.(http.Flusher).Flush
	began := time.Now()
	for i := 0; i < e.frames; i++ {
		time.Sleep(time.Duration(i)*e.pace - time.Since(began))
		fmt.Fprintf(out, chunk+`"choices":[{"index":0,"delta":{"role":"assistant","content":"%d@%d the keeper wants 47.50 more "},"finish_reason":null}]}`+"\n\n", i, time.Now().UnixNano())
		flush()
	}
	io.WriteString(out, chunk+`"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}`+"\n\n")
	if usage {
		io.WriteString(out, chunk+`"choices":[],"usage":{"prompt_tokens":480,"completion_tokens":470,"total_tokens":950}}`+"\n\n")
	}
	io.WriteString(out, "data: [DONE]\n\n")
}

// bucket takes every object and keeps none.
type bucket struct{ puts, bytes int64 }

func (b *bucket) ServeHTTP(out http.ResponseWriter, in *http.Request) {
	switch {
	case in.URL.Path == "/stats":
		fmt.Fprintf(out, `{"puts": %d, "bytes": %d}`, atomic.LoadInt64(&b.puts), atomic.LoadInt64(&b.bytes))
	case in.Method == http.MethodPut:
		n, _ := io.Copy(io.Discard, in.Body)
		atomic.AddInt64(&b.puts, 1)
		atomic.AddInt64(&b.bytes, n)
		out.Header().Set("ETag", `"d41d8cd98f00b204e9800998ecf8427e"`)
	case in.Method == http.MethodGet:
		out.Header().Set("Content-Type", "application/xml")
		io.WriteString(out, `<?xml version="1.0"?><ListBucketResult><Name>b</Name><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>`)
	case in.Method == http.MethodHead:
		http.NotFound(out, in)
	}
}
