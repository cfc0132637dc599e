// Calls envd as Go programs do: with connect-go in each of its protocols over HTTP/1.1 and HTTP/2,
// and with grpc-go over HTTP/2. Messages are built from the protos at run time, so nothing is
// generated and kept.
//
//	go run . -address 127.0.0.1:49983 -protos ../../proto
//
// Ends with status 1 when an answer is not as expected.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"time"

	"connectrpc.com/connect"
	"github.com/bufbuild/protocompile"
	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
)

// A bound on all calls of one client.
const patience = 2 * time.Minute

// A client of one kind. Requests are JSON, and so are the answers.
type client interface {
	unary(ctx context.Context, method protoreflect.MethodDescriptor, request string) (message, error)
	// send makes a call with many requests and one answer.
	send(ctx context.Context, method protoreflect.MethodDescriptor, requests []string) (message, error)
	// follow makes a call with one request and many answers.
	follow(ctx context.Context, method protoreflect.MethodDescriptor, request string) (stream, error)
	// code is the name of an error's code.
	code(err error) string
}

type stream interface {
	// next is the next message, and io.EOF behind the last one.
	next() (message, error)
}

type message struct{ protoreflect.Message }

// at follows a path of fields; what is not set ends it with an invalid message.
func (m message) at(path ...string) message {
	for _, name := range path {
		field := m.Descriptor().Fields().ByName(protoreflect.Name(name))
		if field == nil || !m.Has(field) {
			return message{}
		}
		m = message{m.Get(field).Message()}
	}
	return m
}

func (m message) get(name string) protoreflect.Value {
	return m.Get(m.Descriptor().Fields().ByName(protoreflect.Name(name)))
}

func (m message) has(name string) bool {
	return m.Message != nil && m.Has(m.Descriptor().Fields().ByName(protoreflect.Name(name)))
}

func build(kind protoreflect.MessageDescriptor, text string) *dynamicpb.Message {
	built := dynamicpb.NewMessage(kind)
	if err := protojson.Unmarshal([]byte(text), built); err != nil {
		log.Fatalf("%s: %v", text, err)
	}
	return built
}

func path(method protoreflect.MethodDescriptor) string {
	return fmt.Sprintf("/%s/%s", method.Parent().FullName(), method.Name())
}

// connectClient is connect-go with some options, over some transport.
type connectClient struct {
	http    *http.Client
	base    string
	options []connect.ClientOption
}

func (c connectClient) of(method protoreflect.MethodDescriptor) *connect.Client[dynamicpb.Message, dynamicpb.Message] {
	options := append([]connect.ClientOption{
		connect.WithSchema(method),
		connect.WithResponseInitializer(func(_ connect.Spec, answer any) error {
			*answer.(*dynamicpb.Message) = *dynamicpb.NewMessage(method.Output())
			return nil
		}),
	}, c.options...)
	return connect.NewClient[dynamicpb.Message, dynamicpb.Message](c.http, c.base+path(method), options...)
}

func (c connectClient) unary(ctx context.Context, method protoreflect.MethodDescriptor, request string) (message, error) {
	answer, err := c.of(method).CallUnary(ctx, connect.NewRequest(build(method.Input(), request)))
	if err != nil {
		return message{}, err
	}
	return message{answer.Msg}, nil
}

func (c connectClient) send(ctx context.Context, method protoreflect.MethodDescriptor, requests []string) (message, error) {
	call := c.of(method).CallClientStream(ctx)
	for _, request := range requests {
		if err := call.Send(build(method.Input(), request)); err != nil {
			return message{}, err
		}
	}
	answer, err := call.CloseAndReceive()
	if err != nil {
		return message{}, err
	}
	return message{answer.Msg}, nil
}

type connectStream struct {
	*connect.ServerStreamForClient[dynamicpb.Message]
}

func (s connectStream) next() (message, error) {
	if s.Receive() {
		return message{s.Msg()}, nil
	}
	if err := s.Err(); err != nil {
		return message{}, err
	}
	return message{}, io.EOF
}

func (c connectClient) follow(ctx context.Context, method protoreflect.MethodDescriptor, request string) (stream, error) {
	call, err := c.of(method).CallServerStream(ctx, connect.NewRequest(build(method.Input(), request)))
	return connectStream{call}, err
}

func (c connectClient) code(err error) string { return connect.CodeOf(err).String() }

// grpcClient is grpc-go.
type grpcClient struct{ *grpc.ClientConn }

func (c grpcClient) unary(ctx context.Context, method protoreflect.MethodDescriptor, request string) (message, error) {
	answer := dynamicpb.NewMessage(method.Output())
	err := c.Invoke(ctx, path(method), build(method.Input(), request), answer)
	return message{answer}, err
}

func (c grpcClient) open(ctx context.Context, method protoreflect.MethodDescriptor, requests []string) (grpc.ClientStream, error) {
	desc := grpc.StreamDesc{ServerStreams: method.IsStreamingServer(), ClientStreams: method.IsStreamingClient()}
	call, err := c.NewStream(ctx, &desc, path(method))
	if err != nil {
		return nil, err
	}
	for _, request := range requests {
		if err := call.SendMsg(build(method.Input(), request)); err != nil {
			return nil, err
		}
	}
	return call, call.CloseSend()
}

func (c grpcClient) send(ctx context.Context, method protoreflect.MethodDescriptor, requests []string) (message, error) {
	call, err := c.open(ctx, method, requests)
	if err != nil {
		return message{}, err
	}
	answer := dynamicpb.NewMessage(method.Output())
	return message{answer}, call.RecvMsg(answer)
}

type grpcStream struct {
	call   grpc.ClientStream
	output protoreflect.MessageDescriptor
}

func (s grpcStream) next() (message, error) {
	answer := dynamicpb.NewMessage(s.output)
	return message{answer}, s.call.RecvMsg(answer)
}

func (c grpcClient) follow(ctx context.Context, method protoreflect.MethodDescriptor, request string) (stream, error) {
	call, err := c.open(ctx, method, []string{request})
	return grpcStream{call, method.Output()}, err
}

func (c grpcClient) code(err error) string {
	if status.Code(err) == codes.NotFound {
		return "not_found"
	}
	return status.Code(err).String()
}

// check runs the same calls whatever the client. asks says whether it gets extension fields.
func check(c client, process, filesystem protoreflect.ServiceDescriptor, asks bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	method := func(service protoreflect.ServiceDescriptor, name string) protoreflect.MethodDescriptor {
		return service.Methods().ByName(protoreflect.Name(name))
	}

	events, err := c.follow(ctx, method(process, "Start"), `{"process": {"cmd": "cat", "cwd": "/"}}`)
	if err != nil {
		return fmt.Errorf("Start: %w", err)
	}
	first, err := events.next()
	if err != nil {
		return fmt.Errorf("the first event: %w", err)
	}
	start := first.at("event", "start")
	if start.Message == nil || start.get("pid").Uint() == 0 {
		return fmt.Errorf("the first event is %v", first)
	}
	if start.has("process_id") != asks {
		return fmt.Errorf("extension fields: wanted %v: %v", asks, first)
	}
	pid := start.get("pid").Uint()
	selector := fmt.Sprintf(`{"pid": %d}`, pid)

	// "one\n" and "two\n".
	input := fmt.Sprintf(`{"process": %s, "input": {"stdin": "b25lCg=="}}`, selector)
	if _, err := c.unary(ctx, method(process, "SendInput"), input); err != nil {
		return fmt.Errorf("SendInput: %w", err)
	}
	inputs := []string{
		fmt.Sprintf(`{"start": {"process": %s}}`, selector),
		`{"data": {"input": {"stdin": "dHdvCg=="}}}`,
	}
	if _, err := c.send(ctx, method(process, "StreamInput"), inputs); err != nil {
		return fmt.Errorf("StreamInput: %w", err)
	}
	closing := fmt.Sprintf(`{"process": %s}`, selector)
	if _, err := c.unary(ctx, method(process, "CloseStdin"), closing); err != nil {
		return fmt.Errorf("CloseStdin: %w", err)
	}
	output, ended := "", false
	for {
		event, err := events.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("an event: %w", err)
		}
		if data := event.at("event", "data"); data.Message != nil {
			output += string(data.get("stdout").Bytes())
		}
		if end := event.at("event", "end"); end.Message != nil {
			ended = end.get("exited").Bool() && end.get("status").String() == "exit status 0"
		}
	}
	if output != "one\ntwo\n" || !ended {
		return fmt.Errorf("output %q, ended %v", output, ended)
	}

	listing, err := c.unary(ctx, method(filesystem, "ListDir"), `{"path": "/", "depth": 1}`)
	if err != nil {
		return fmt.Errorf("ListDir: %w", err)
	}
	if listing.get("entries").List().Len() == 0 {
		return errors.New("ListDir: nothing in /")
	}

	// Errors: of a unary call, and of a stream behind its head.
	missing := `{"process": {"tag": "no such process"}}`
	if _, err := c.unary(ctx, method(process, "CloseStdin"), missing); err == nil || c.code(err) != "not_found" {
		return fmt.Errorf("CloseStdin of a process that is not there: %v", err)
	}
	lost, err := c.follow(ctx, method(process, "Connect"), missing)
	if err == nil {
		_, err = lost.next()
	}
	if err == nil || c.code(err) != "not_found" {
		return fmt.Errorf("Connect to a process that is not there: %v", err)
	}
	return nil
}

func main() {
	address := flag.String("address", "127.0.0.1:49983", "where envd listens")
	protos := flag.String("protos", "../../proto", "the directory of envd's protos")
	flag.Parse()

	compiler := protocompile.Compiler{Resolver: protocompile.WithStandardImports(
		&protocompile.SourceResolver{ImportPaths: []string{*protos}},
	)}
	files, err := compiler.Compile(context.Background(), "process/process.proto", "filesystem/filesystem.proto")
	if err != nil {
		log.Fatal(err)
	}
	process := files[0].Services().ByName("Process")
	filesystem := files[1].Services().ByName("Filesystem")

	http1 := &http.Client{Transport: &http.Transport{TLSNextProto: map[string]func(string, *tls.Conn) http.RoundTripper{}}}
	h2c := &http.Client{Transport: &http2.Transport{
		AllowHTTP: true,
		DialTLSContext: func(ctx context.Context, network, address string, _ *tls.Config) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, address)
		},
	}}
	conn, err := grpc.NewClient("passthrough:///"+*address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	with := func(client *http.Client, options ...connect.ClientOption) connectClient {
		return connectClient{client, "http://" + *address, options}
	}
	failed := false
	for _, each := range []struct {
		name   string
		client client
		asks   bool
	}{
		{"connect-go: gRPC over HTTP/1.1", with(http1, connect.WithGRPC()), false},
		{"connect-go: gRPC over HTTP/1.1 with gzip", with(http1, connect.WithGRPC(), connect.WithSendGzip()), false},
		{"connect-go: gRPC over HTTP/2", with(h2c, connect.WithGRPC()), true},
		{"connect-go: gRPC-Web over HTTP/1.1", with(http1, connect.WithGRPCWeb()), false},
		{"connect-go: gRPC-Web over HTTP/2", with(h2c, connect.WithGRPCWeb()), false},
		{"connect-go: Connect over HTTP/1.1", with(http1), false},
		{"connect-go: Connect over HTTP/2", with(h2c), false},
		{"connect-go: Connect in JSON over HTTP/1.1", with(http1, connect.WithProtoJSON()), false},
		{"grpc-go over HTTP/2", grpcClient{conn}, true},
	} {
		if err := check(each.client, process, filesystem, each.asks); err != nil {
			fmt.Printf("FAILED: %s: %v\n", each.name, err)
			failed = true
			continue
		}
		fmt.Println("ok:", each.name)
	}
	if failed {
		os.Exit(1)
	}
}
