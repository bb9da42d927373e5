package plugins

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-plugin"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/plugins/signerpb"
	"github.com/trustd/trustd/signer"
)

// Settings are what the host tells the plugin process once it runs.
type Settings struct {
	Module      string
	TokenLabel  string
	TokenSerial string
	PIN         func(context.Context) ([]byte, error)
	Sessions    int
	Log         *slog.Logger
}

// handshake is a check against starting the binary by hand, not security: that is the mutual TLS between the ends.
var handshake = plugin.HandshakeConfig{
	ProtocolVersion: 1, MagicCookieKey: "TRUSTD_PLUGIN", MagicCookieValue: "signer",
}

const (
	service    = "signer"
	requestsFD = 3        // the child's socket for requests
	maxMessage = 16 << 20 // that is signed; the daemon's own limit is far below
	maxFrame   = 20 << 20 // that one end takes from the other through gRPC
)

// Serve is the main function of a plugin process: it serves the backend that open makes until the host goes away.
// It returns the process's exit code.
func Serve(open func(Settings) signer.Backend) int {
	harden()
	sessions := runtime.NumCPU()
	// A thread inside the module keeps its processor for a while: without spare ones, the goroutines that move
	// requests and results would wait for it.
	runtime.GOMAXPROCS(sessions + runtime.NumCPU())
	s := &server{open: open, sessions: sessions, log: childLog(), keys: map[uint32]signer.Key{}}
	unix.CloseOnExec(requestsFD) // what the module executes does not inherit it
	go s.serveRequests(requestsFD)
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig: handshake,
		Plugins:         plugin.PluginSet{service: &servePlugin{server: s}},
		GRPCServer: func(opts []grpc.ServerOption) *grpc.Server {
			return grpc.NewServer(append(opts, grpc.MaxRecvMsgSize(maxFrame))...)
		},
		Logger: &hclogger{log: s.log},
	})
	if b, err := s.backend(); err == nil {
		if err := b.Close(); err != nil {
			return 1
		}
	}
	return 0
}

// harden keeps the PIN out of core dumps and of other processes of the same user, and the daemon's standard input
// out of the module's reach.
func harden() {
	// The binary was executed by file descriptor, whose number would be its name in a process list.
	_ = os.WriteFile("/proc/self/comm", []byte(filepath.Base(os.Args[0])), 0)
	_ = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	if null, err := os.Open(os.DevNull); err == nil {
		_ = unix.Dup3(int(null.Fd()), 0, 0)
		_ = null.Close()
	}
}

type servePlugin struct {
	plugin.NetRPCUnsupportedPlugin
	server *server
}

func (p *servePlugin) GRPCServer(_ *plugin.GRPCBroker, s *grpc.Server) error {
	signerpb.RegisterBackendServer(s, p.server)
	return nil
}

func (p *servePlugin) GRPCClient(context.Context, *plugin.GRPCBroker, *grpc.ClientConn) (any, error) {
	return nil, fault.New(fault.Unsupported, "this is the plugin's end")
}

// A server is the plugin's end of the boundary.
type server struct {
	signerpb.UnimplementedBackendServer
	open     func(Settings) signer.Backend
	sessions int
	log      *slog.Logger

	mu    sync.RWMutex
	inner signer.Backend
	keys  map[uint32]signer.Key // by the ref that the host knows
	last  uint32

	running running
}

func (s *server) backend() (signer.Backend, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.inner == nil {
		return nil, fault.New(fault.DeviceDead, "the plugin is not configured")
	}
	return s.inner, nil
}

// Configure opens the backend and probes it. A second call changes nothing: a PIN is given once.
func (s *server) Configure(ctx context.Context, r *signerpb.ConfigureRequest) (*signerpb.DescribeResponse, error) {
	s.mu.Lock()
	if s.inner == nil {
		pin := slices.Clone(r.GetPin())
		s.inner = s.open(Settings{
			Module: r.GetModule(), TokenLabel: r.GetTokenLabel(), TokenSerial: r.GetTokenSerial(),
			PIN:      func(context.Context) ([]byte, error) { return slices.Clone(pin), nil },
			Sessions: s.sessions, Log: s.log,
		})
	}
	s.mu.Unlock()
	clear(r.GetPin())
	return s.Describe(ctx, nil)
}

// Describe answers with the backend's description.
func (s *server) Describe(ctx context.Context, _ *signerpb.DescribeRequest) (*signerpb.DescribeResponse, error) {
	b, err := s.backend()
	if err != nil {
		return &signerpb.DescribeResponse{Error: encodeError(err)}, nil
	}
	return encodeDescription(b.Describe(ctx)), nil
}

// Ping answers from memory.
func (s *server) Ping(context.Context, *signerpb.PingRequest) (*signerpb.PingResponse, error) {
	return &signerpb.PingResponse{OldestCallMs: s.running.oldest(time.Now()).Milliseconds()}, nil
}

// Generate makes a key and keeps it open.
func (s *server) Generate(ctx context.Context, r *signerpb.GenerateRequest) (*signerpb.KeyResponse, error) {
	return s.key(func(b signer.Backend) (signer.Key, error) {
		alg := ident.Algorithm(0) // what no byte can hold is no algorithm either
		if r.GetAlgorithm() <= math.MaxUint8 {
			alg = ident.Algorithm(r.GetAlgorithm())
		}
		return b.Generate(ctx, signer.ID(r.GetId()), alg)
	})
}

// Open opens a key.
func (s *server) Open(ctx context.Context, r *signerpb.OpenRequest) (*signerpb.KeyResponse, error) {
	return s.key(func(b signer.Backend) (signer.Key, error) {
		pub, err := ident.ParseSPKI(r.GetSpki())
		if err != nil {
			return nil, err
		}
		return b.Open(ctx, signer.ID(r.GetId()), pub)
	})
}

// Import takes a private key in and keeps it open.
func (s *server) Import(ctx context.Context, r *signerpb.ImportRequest) (*signerpb.KeyResponse, error) {
	defer clear(r.GetPkcs8())
	return s.key(func(b signer.Backend) (signer.Key, error) {
		i, ok := b.(signer.Importer)
		if !ok {
			return nil, fault.New(fault.Unsupported, "this backend imports no keys")
		}
		return i.Import(ctx, signer.ID(r.GetId()), r.GetPkcs8())
	})
}

func (s *server) key(get func(signer.Backend) (signer.Key, error)) (*signerpb.KeyResponse, error) {
	b, err := s.backend()
	if err != nil {
		return &signerpb.KeyResponse{Error: encodeError(err)}, nil
	}
	k, err := get(b)
	if err != nil {
		return &signerpb.KeyResponse{Error: encodeError(err)}, nil
	}
	s.mu.Lock()
	s.last++
	ref := s.last
	s.keys[ref] = k
	s.mu.Unlock()
	return &signerpb.KeyResponse{Info: encodeInfo(k.Info()), Ref: ref}, nil
}

// Find looks a key up.
func (s *server) Find(ctx context.Context, r *signerpb.FindRequest) (*signerpb.KeyResponse, error) {
	b, err := s.backend()
	if err != nil {
		return &signerpb.KeyResponse{Error: encodeError(err)}, nil
	}
	info, err := b.Find(ctx, signer.ID(r.GetId()))
	if err != nil {
		return &signerpb.KeyResponse{Error: encodeError(err)}, nil
	}
	return &signerpb.KeyResponse{Info: encodeInfo(info)}, nil
}

// Keys lists the keys.
func (s *server) Keys(ctx context.Context, _ *signerpb.KeysRequest) (*signerpb.KeysResponse, error) {
	b, err := s.backend()
	if err != nil {
		return &signerpb.KeysResponse{Error: encodeError(err)}, nil
	}
	keys, err := b.Keys(ctx)
	out := &signerpb.KeysResponse{Error: encodeError(err)}
	for _, k := range keys {
		out.Keys = append(out.Keys, encodeInfo(k))
	}
	return out, nil
}

// Destroy deletes a key.
func (s *server) Destroy(ctx context.Context, r *signerpb.DestroyRequest) (*signerpb.DestroyResponse, error) {
	b, err := s.backend()
	if err == nil {
		err = b.Destroy(ctx, signer.ID(r.GetId()))
	}
	return &signerpb.DestroyResponse{Error: encodeError(err)}, nil
}

// serveRequests signs what comes in on the socket, with as many workers as there are sessions: the kernel wakes them
// in turn, and more of them would only come with colder caches. Each worker is a thread that blocks in the kernel: a
// request wakes one, which reads, signs, verifies and answers, and no other goroutine.
func (s *server) serveRequests(socket int) {
	var workers sync.WaitGroup
	for range s.sessions {
		workers.Go(func() { s.work(socket) })
	}
	workers.Wait()
}

func (s *server) work(socket int) {
	buf := make([]byte, maxPacket)
	for {
		n, err := unix.Read(socket, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return // the host went away
		}
		var in signerpb.SignFrame
		if err := proto.Unmarshal(buf[:n], &in); err != nil {
			s.log.Error("reading a request", "err", err)
			return
		}
		out, err := proto.Marshal(s.signFrame(&in))
		if err == nil {
			_, err = unix.Write(socket, out)
		}
		if err != nil {
			s.log.Error("answering a request", "err", err)
			return
		}
	}
}

// SignLarge signs what does not fit into a packet.
func (s *server) SignLarge(_ context.Context, in *signerpb.SignFrame) (*signerpb.ResultFrame, error) {
	return s.signFrame(in), nil
}

func (s *server) signFrame(in *signerpb.SignFrame) *signerpb.ResultFrame {
	out := &signerpb.ResultFrame{Results: make([]*signerpb.SignResult, len(in.GetRequests()))}
	for i, r := range in.GetRequests() {
		out.Results[i] = s.signOne(r)
	}
	return out
}

func (s *server) signOne(r *signerpb.SignRequest) *signerpb.SignResult {
	s.mu.RLock()
	k := s.keys[r.GetRef()]
	s.mu.RUnlock()
	if k == nil {
		return &signerpb.SignResult{Id: r.GetId(), Error: encodeError(fault.New(fault.DeviceDead, "the key is not open"))}
	}
	done := s.running.start(time.Now())
	defer done()
	// No deadline of its own: the host kills a process whose call does not come back.
	sig, err := k.Sign(context.Background(), r.GetMessage())
	return &signerpb.SignResult{Id: r.GetId(), Signature: sig, Error: encodeError(err)}
}

// running knows when each call that runs was started.
type running struct {
	starts [256]atomic.Int64 // nanoseconds since base; 0: free
}

var base = time.Now()

// start notes a call and returns the function that notes its end. More calls at once than there are places are
// not watched.
func (r *running) start(now time.Time) (done func()) {
	at := int64(now.Sub(base)) + 1
	for i := range r.starts {
		if r.starts[i].CompareAndSwap(0, at) {
			return func() { r.starts[i].Store(0) }
		}
	}
	return func() {}
}

// oldest returns how long the oldest call has been running.
func (r *running) oldest(now time.Time) time.Duration {
	var longest time.Duration
	for i := range r.starts {
		if at := r.starts[i].Load(); at != 0 {
			longest = max(longest, now.Sub(base)-time.Duration(at-1))
		}
	}
	return longest
}
