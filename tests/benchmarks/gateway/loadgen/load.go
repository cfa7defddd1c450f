package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/url"
	"os"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const patience = 30 * time.Second

type options struct {
	targets, headers, watched many
	connections               int
	rate, seconds             float64
	stream, users, waits      bool
	frames                    int
	log                       string
}

// a target is one call of the chain that makes up a measured call: the pair's two upstream calls, say.
type target struct {
	address, head string
	model         string
	stream        bool
}

func load(arguments []string) {
	o := parseOptions(arguments)
	run := &run{options: o, targets: targets(o), sample: &sample{headers: map[string]map[string]int{}, kinds: map[string]int{}}}
	callers := make([]*caller, o.connections)
	for i := range callers {
		callers[i] = &caller{run: run, lines: make([]*line, len(run.targets))}
	}
	prime(callers) // connections are open, and a peer's lazy parts loaded, before anything is counted
	run.sample.reset()
	if o.waits {
		fmt.Println(`{"ready": true}`)
		bufio.NewReader(os.Stdin).ReadString('\n')
	}
	run.do(callers)
	json.NewEncoder(os.Stdout).Encode(run.result())
	if o.waits { // connections stay until whoever measures has looked at the other side
		io.Copy(io.Discard, os.Stdin)
	}
}

func parseOptions(arguments []string) options {
	var o options
	flags := flag.NewFlagSet("load", flag.ExitOnError)
	flags.Var(&o.targets, "target", "URL[|MODEL] that is asked; several: one after the other make up one call")
	flags.Var(&o.headers, "header", "NAME: VALUE that is sent along")
	flags.Var(&o.watched, "watch", "header of the answers whose values are counted")
	flags.IntVar(&o.connections, "connections", 1, "calls at a time")
	flags.Float64Var(&o.rate, "rate", 0, "calls a second, each with its time to start; 0: one after the other")
	flags.Float64Var(&o.seconds, "seconds", 5, "how long")
	flags.BoolVar(&o.stream, "stream", false, "ask the last target for a stream")
	flags.IntVar(&o.frames, "frames", 20, "frames that a whole stream has")
	flags.BoolVar(&o.users, "users", false, "each call is of a user of its own")
	flags.BoolVar(&o.waits, "wait", false, "say {\"ready\": true}, then wait for a line before it begins")
	flags.StringVar(&o.log, "log", "", "file for a line a call: number, ns when due, sent and answered, x-cowest-arm, fault")
	flags.Parse(arguments)
	if len(o.targets) == 0 || o.connections < 1 {
		fail("wanted a -target and at least one connection")
	}
	return o
}

func targets(o options) []target {
	var found []target
	for i, given := range o.targets {
		address, model, _ := strings.Cut(given, "|")
		if model == "" {
			model = "stub"
		}
		where, err := url.Parse(address)
		if err != nil || where.Host == "" {
			fail("-target %s is no address", given)
		}
		head := "POST " + where.RequestURI() + " HTTP/1.1\r\nHost: " + where.Host + "\r\nContent-Type: application/json\r\nAuthorization: Bearer sk-bench\r\n"
		for _, header := range o.headers {
			head += header + "\r\n"
		}
		found = append(found, target{where.Host, head, model, o.stream && i == len(o.targets)-1})
	}
	return found
}

// ---------------------------------------------------------------- what is measured
type sample struct {
	sync.Mutex
	latency, first, frame, lag []float64 // microseconds
	failures                   int
	sameBytes, sameText        int
	durableStreams             int
	kinds                      map[string]int
	headers                    map[string]map[string]int
	rows                       []row
	last                       time.Time
}

type row struct {
	number          int64
	due, sent, done int64 // ns
	arm, fault      string
}

func (s *sample) reset() {
	*s = sample{headers: map[string]map[string]int{}, kinds: map[string]int{}}
}

func (r *run) result() map[string]interface{} {
	s := r.sample
	out := map[string]interface{}{
		"calls": len(s.latency) + s.failures, "failures": s.failures, "kinds": s.kinds,
		"seconds": s.last.Sub(r.began).Seconds(), "same_bytes": s.sameBytes, "same_text": s.sameText,
		"headers": s.headers, "durable_streams": s.durableStreams,
		"latency_us": s.latency, "ttft_us": s.first, "frame_us": s.frame, "lag_us": s.lag,
	}
	for name, values := range map[string][]float64{"": s.latency, "ttft_": s.first, "frame_": s.frame, "lag_": s.lag} {
		if len(values) > 0 {
			out[name+"p50_us"], out[name+"p99_us"] = quantile(values, 0.5), quantile(values, 0.99)
		}
	}
	if r.options.log != "" {
		r.writeLog()
	}
	return out
}

func (r *run) writeLog() {
	file, err := os.Create(r.options.log)
	if err != nil {
		fail("%v", err)
	}
	out := bufio.NewWriter(file)
	for _, row := range r.sample.rows {
		fmt.Fprintf(out, "%d\t%d\t%d\t%d\t%s\t%s\n", row.number, row.due, row.sent, row.done, row.arm, row.fault)
	}
	if out.Flush() != nil || file.Close() != nil {
		fail("%s cannot be written", r.options.log)
	}
}

func quantile(values []float64, q float64) float64 {
	sorted := append([]float64(nil), values...)
	sort.Float64s(sorted)
	return sorted[int(math.Min(q*float64(len(sorted)), float64(len(sorted)-1)))]
}

// ---------------------------------------------------------------- the run
type run struct {
	options options
	targets []target
	sample  *sample
	next    int64
	began   time.Time
}

type caller struct {
	run   *run
	lines []*line
}

func prime(callers []*caller) {
	for _, caller := range callers {
		caller.call(-1, time.Now())
	}
}

func (r *run) do(callers []*caller) {
	r.began = time.Now()
	var all sync.WaitGroup
	for _, each := range callers {
		all.Add(1)
		go func(caller *caller) {
			defer all.Done()
			caller.work()
		}(each)
	}
	all.Wait()
}

// work takes the next call that is due; the time to start does not wait for the answers before it.
func (c *caller) work() {
	r := c.run
	end := r.began.Add(time.Duration(r.options.seconds * float64(time.Second)))
	for {
		number, due := atomic.AddInt64(&r.next, 1)-1, time.Now()
		if r.options.rate > 0 {
			due = r.began.Add(time.Duration(float64(number) / r.options.rate * float64(time.Second)))
		}
		if !due.Before(end) {
			return
		}
		time.Sleep(time.Until(due))
		c.call(number, due)
	}
}

// an outcome is what one answer was like.
type outcome struct {
	fault       string
	first       time.Time
	frames      []float64
	bytes, text bool
	durable     bool
	header      http.Header
}

func (c *caller) call(number int64, due time.Time) {
	sent, answer := time.Now(), outcome{}
	for i := range c.run.targets {
		if answer = c.ask(i, number); answer.fault != "" {
			break
		}
	}
	c.run.sample.note(c.run, number, due, sent, time.Now(), answer)
}

func (s *sample) note(r *run, number int64, due, sent, done time.Time, answer outcome) {
	s.Lock()
	defer s.Unlock()
	s.last = done
	if r.options.log != "" {
		s.rows = append(s.rows, row{number, due.UnixNano(), sent.UnixNano(), done.UnixNano(), answer.header.Get("X-Cowest-Arm"), answer.fault})
	}
	if answer.fault != "" {
		s.failures++
		s.kinds[answer.fault]++
		return
	}
	s.latency = append(s.latency, micros(done.Sub(due)))
	s.lag = append(s.lag, micros(sent.Sub(due)))
	if !answer.first.IsZero() {
		s.first = append(s.first, micros(answer.first.Sub(due)))
		s.frame = append(s.frame, answer.frames...)
	}
	s.sameBytes += count(answer.bytes)
	s.sameText += count(answer.text)
	s.durableStreams += count(answer.durable)
	for _, name := range r.options.watched {
		if s.headers[name] == nil {
			s.headers[name] = map[string]int{}
		}
		s.headers[name][answer.header.Get(name)]++
	}
}

func micros(d time.Duration) float64 { return math.Round(float64(d.Nanoseconds())/100) / 10 }

func count(is bool) int {
	if is {
		return 1
	}
	return 0
}

// ---------------------------------------------------------------- one call
const system = "You are the desk of a freight forwarder. Answer in two sentences, and name the form that is needed."

var question = strings.Repeat("Where is the consignment, who is its keeper, and what does a day of waiting cost? ", 22)

func (c *caller) body(t target, number int64) []byte {
	more := ""
	if t.stream {
		more = `,"stream":true`
	}
	if c.run.options.users {
		more += fmt.Sprintf(`,"user":"user-%d"`, number)
	}
	return []byte(fmt.Sprintf(`{"model":"%s","messages":[{"role":"system","content":"%s"},{"role":"user","content":"Case %d. %s"}],"temperature":0.2,"max_tokens":512%s}`,
		t.model, system, number, question, more))
}

// a line is a connection that is kept.
type line struct {
	conn net.Conn
	in   *bufio.Reader
}

func (c *caller) ask(i int, number int64) outcome {
	t := c.run.targets[i]
	if c.lines[i] == nil {
		conn, err := net.DialTimeout("tcp", t.address, patience)
		if err != nil {
			return outcome{fault: "not connected"}
		}
		c.lines[i] = &line{conn, bufio.NewReaderSize(conn, 16384)}
	}
	answer := c.lines[i].exchange(t, c.body(t, number), c.run.options.frames)
	if answer.fault != "" || answer.header.Get("Connection") == "close" {
		c.lines[i].conn.Close()
		c.lines[i] = nil
	}
	return answer
}

func (l *line) exchange(t target, body []byte, frames int) outcome {
	l.conn.SetDeadline(time.Now().Add(patience))
	request := make([]byte, 0, len(t.head)+len(body)+40)
	request = append(append(request, t.head...), "Content-Length: "+strconv.Itoa(len(body))+"\r\n\r\n"...)
	if _, err := l.conn.Write(append(request, body...)); err != nil {
		return outcome{fault: "broken off"}
	}
	response, err := http.ReadResponse(l.in, nil)
	if err != nil {
		return outcome{fault: "broken off"}
	}
	answer := outcome{header: response.Header}
	if t.stream && response.StatusCode == 200 {
		answer.readStream(response.Body, frames)
		return answer
	}
	data, err := io.ReadAll(response.Body)
	switch {
	case err != nil:
		answer.fault = "cut"
	case response.StatusCode != 200:
		answer.fault = "status " + strconv.Itoa(response.StatusCode)
	default:
		answer.check(data)
	}
	return answer
}

// check looks whether the stub's answer came through: its very bytes, or at least its text.
func (o *outcome) check(data []byte) {
	if o.bytes = bytes.Equal(data, whole); o.bytes {
		o.text = true
		return
	}
	var given struct {
		Choices []struct{ Message struct{ Content string } }
	}
	o.text = json.Unmarshal(data, &given) == nil && len(given.Choices) == 1 && given.Choices[0].Message.Content == text
	if !o.text {
		o.fault = "wrong text"
	}
}

// readStream notes when the first frame and each of them came, against what the stub wrote into it.
func (o *outcome) readStream(body io.Reader, frames int) {
	in, wanted, done := bufio.NewReaderSize(body, 65536), 0, false
	for {
		text, err := in.ReadSlice('\n')
		now := time.Now()
		if err != nil {
			break
		}
		switch {
		case bytes.HasPrefix(text, []byte("data: [DONE]")):
			done = true
		case bytes.HasPrefix(text, []byte("data:")):
			if number, written, ok := stamp(text); ok {
				if number != wanted {
					o.fault = "frames out of order"
				}
				if wanted == 0 {
					o.first = now
				}
				wanted++
				o.frames = append(o.frames, math.Round(float64(now.UnixNano()-written)/100)/10)
			}
		case bytes.HasPrefix(text, []byte(": trace durable")):
			o.durable = true
		}
	}
	if o.fault == "" && (!done || wanted != frames) {
		o.fault = "stream not whole"
	}
	o.text = o.fault == ""
}

var content = []byte(`"content":`)

// stamp reads NUMBER@NANOSECONDS at the head of a frame's text.
func stamp(text []byte) (int, int64, bool) {
	at := bytes.Index(text, content)
	if at < 0 {
		return 0, 0, false
	}
	rest := bytes.TrimLeft(text[at+len(content):], ` "`)
	end := bytes.IndexByte(rest, ' ')
	if end < 0 {
		return 0, 0, false
	}
	number, written, _ := strings.Cut(string(rest[:end]), "@")
	i, err := strconv.Atoi(number)
	ns, err2 := strconv.ParseInt(written, 10, 64)
	return i, ns, err == nil && err2 == nil
}
