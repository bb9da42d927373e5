package plugins

import (
	"context"
	"errors"
	"log/slog"
	"maps"
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
	// Values are the backend's settings from the daemon's configuration. A backend that reports a serial in
	// Description.Limits["serial"] finds it as the value "serial" when it is started again: it must then accept no
	// other device.
	Values map[string]string
	// PIN returns the PIN or other secret, or nothing where none is configured. A backend asks for it right before it
	// shows it to the device, and clears it after use.
	PIN func(context.Context) ([]byte, error)
	// Sessions is how many signatures are worth making at once on this host: its number of processors.
	Sessions int
	Log      *slog.Logger
}

// Protocol is the version of the plugin protocol that this package speaks, on both ends.
const Protocol = 2

// handshake is a check against starting the binary by hand, not security: that is the mutual TLS between the ends.
var handshake = plugin.HandshakeConfig{
	ProtocolVersion: Protocol, MagicCookieKey: "TRUSTD_PLUGIN", MagicCookieValue: "signer",
}

const (
	service     = "signer"
	requestsFD  = 3        // the child's socket for requests
	maxMessage  = 16 << 20 // that is signed; the daemon's own limit is far below
	maxFrame    = 20 << 20 // that one end takes from the other through gRPC
	maxParallel = 256      // signatures at once
)

// Serve is the main function of a plugin process: it serves the backend that open makes until the host goes away.
// It returns the process's exit code.
func Serve(open func(Settings) signer.Backend) int {
	s := &server{open: open, sessions: runtime.NumCPU(), keys: map[uint32]signer.Key{}}
	s.log = childLog(&s.level)
	harden()
	unix.CloseOnExec(requestsFD) // what the module executes does not inherit it
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig:  handshake,
		VersionedPlugins: map[int]plugin.PluginSet{Protocol: {service: &servePlugin{server: s}}},
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
	// Where memory runs out, the daemon is worth more than its plugins. Not possible once the process is undumpable.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("500"), 0)
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
	level    slog.LevelVar

	mu    sync.RWMutex
	inner signer.Backend
	keys  map[uint32]signer.Key // by the ref that the host knows
	last  uint32

	running  running // calls that are meant to be quick
	slow     running
	failures tally // at the boundary, for a backend that does not count itself
	taken    atomic.Bool
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
		if r.GetDebug() {
			s.level.Set(slog.LevelDebug)
		}
		pin := slices.Clone(r.GetPin())
		values := map[string]string{}
		maps.Copy(values, r.GetSettings())
		s.inner = s.open(Settings{
			Values: values, Sessions: s.sessions, Log: s.log,
			PIN: func(context.Context) ([]byte, error) {
				if len(pin) > 0 {
					s.announcePIN()
				}
				return slices.Clone(pin), nil
			},
		})
		workers := min(max(s.sessions, parallel(s.inner)), maxParallel)
		// A thread inside the module keeps its processor for a while: without spare ones, the goroutines that move
		// requests and results would wait for it.
		runtime.GOMAXPROCS(workers + runtime.NumCPU())
		s.serveRequests(requestsFD, workers)
	}
	s.mu.Unlock()
	clear(r.GetPin())
	return s.Describe(ctx, nil)
}

// announcePIN tells the host that the device is about to see the PIN. It does so on the socket, where the message
// stays although this process dies in the next moment.
func (s *server) announcePIN() {
	s.taken.Store(true)
	out, err := proto.Marshal(&signerpb.ResultFrame{PinTaken: true})
	if err == nil {
		_, err = unix.Write(requestsFD, out)
	}
	if err != nil {
		s.log.Error("announcing the use of the PIN", "err", err)
	}
}

// Describe answers with the backend's description.
func (s *server) Describe(ctx context.Context, _ *signerpb.DescribeRequest) (*signerpb.DescribeResponse, error) {
	b, err := s.backend()
	if err != nil {
		return &signerpb.DescribeResponse{Error: encodeError(err)}, nil
	}
	out := encodeDescription(b.Describe(ctx))
	out.Standing = s.standing(b)
	return out, nil
}

// Ping answers from memory.
func (s *server) Ping(context.Context, *signerpb.PingRequest) (*signerpb.PingResponse, error) {
	now := time.Now()
	out := &signerpb.PingResponse{
		OldestCallMs: s.running.oldest(now).Milliseconds(), OldestSlowMs: s.slow.oldest(now).Milliseconds(),
	}
	if b, err := s.backend(); err == nil {
		out.Standing = s.standing(b)
	}
	return out, nil
}

// Unlock hands an operator's wish to the backend.
func (s *server) Unlock(ctx context.Context, _ *signerpb.UnlockRequest) (*signerpb.UnlockResponse, error) {
	b, err := s.backend()
	if err == nil {
		if u, ok := b.(signer.Unlocker); ok {
			err = u.Unlock(ctx)
		} else {
			err = fault.New(fault.Unsupported, "this backend unlocks nothing")
		}
	}
	return &signerpb.UnlockResponse{Error: s.failed(err)}, nil
}

func parallel(b signer.Backend) int {
	if p, ok := b.(signer.Parallel); ok {
		return max(p.Parallel(), 1)
	}
	return 1
}

func (s *server) standing(b signer.Backend) *signerpb.Standing {
	out := &signerpb.Standing{
		Parallel: uint32(min(parallel(b), maxParallel)), Failures: map[string]uint64{}, PinTaken: s.taken.Load(),
	}
	counts := s.failures.counts()
	if f, ok := b.(signer.FailureCounter); ok {
		counts = f.Failures()
	}
	for class, n := range counts {
		out.Failures[string(class)] = n
	}
	return out
}

// failed counts an error that leaves the backend, and makes it fit for the wire.
func (s *server) failed(err error) *signerpb.Error {
	if class := signer.ClassOf(err); class != "" {
		s.failures.add(class)
	}
	return encodeError(err)
}

// Generate makes a key and keeps it open.
func (s *server) Generate(ctx context.Context, r *signerpb.GenerateRequest) (*signerpb.KeyResponse, error) {
	return s.key(&s.slow, func(b signer.Backend) (signer.Key, error) {
		alg := ident.Algorithm(0) // what no byte can hold is no algorithm either
		if r.GetAlgorithm() <= math.MaxUint8 {
			alg = ident.Algorithm(r.GetAlgorithm())
		}
		return b.Generate(ctx, signer.ID(r.GetId()), alg)
	})
}

// Open opens a key.
func (s *server) Open(ctx context.Context, r *signerpb.OpenRequest) (*signerpb.KeyResponse, error) {
	return s.key(&s.running, func(b signer.Backend) (signer.Key, error) {
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
	return s.key(&s.slow, func(b signer.Backend) (signer.Key, error) {
		i, ok := b.(signer.Importer)
		if !ok {
			return nil, fault.New(fault.Unsupported, "this backend imports no keys")
		}
		return i.Import(ctx, signer.ID(r.GetId()), r.GetPkcs8())
	})
}

func (s *server) key(in *running, get func(signer.Backend) (signer.Key, error)) (*signerpb.KeyResponse, error) {
	b, err := s.backend()
	if err != nil {
		return &signerpb.KeyResponse{Error: encodeError(err)}, nil
	}
	done := in.start(time.Now())
	k, err := get(b)
	done()
	if err != nil {
		return &signerpb.KeyResponse{Error: s.failed(err)}, nil
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
	done := s.running.start(time.Now())
	info, err := b.Find(ctx, signer.ID(r.GetId()))
	done()
	if err != nil {
		return &signerpb.KeyResponse{Error: s.failed(err)}, nil
	}
	return &signerpb.KeyResponse{Info: encodeInfo(info)}, nil
}

// Keys lists the keys.
func (s *server) Keys(ctx context.Context, _ *signerpb.KeysRequest) (*signerpb.KeysResponse, error) {
	b, err := s.backend()
	if err != nil {
		return &signerpb.KeysResponse{Error: encodeError(err)}, nil
	}
	done := s.slow.start(time.Now())
	keys, err := b.Keys(ctx)
	done()
	out := &signerpb.KeysResponse{Error: s.failed(err)}
	for _, k := range keys {
		out.Keys = append(out.Keys, encodeInfo(k))
	}
	return out, nil
}

// Destroy deletes a key.
func (s *server) Destroy(ctx context.Context, r *signerpb.DestroyRequest) (*signerpb.DestroyResponse, error) {
	b, err := s.backend()
	if err == nil {
		done := s.running.start(time.Now())
		err = b.Destroy(ctx, signer.ID(r.GetId()))
		done()
	}
	return &signerpb.DestroyResponse{Error: s.failed(err)}, nil
}

// serveRequests signs what comes in on the socket, with as many workers as signatures are worth making at once: the
// kernel wakes them in turn, and more of them would only come with colder caches. Each worker is a thread that blocks in
// the kernel: a request wakes one, which reads, signs, verifies and answers, and no other goroutine.
func (s *server) serveRequests(socket, workers int) {
	for range workers {
		go s.work(socket)
	}
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
	return &signerpb.SignResult{Id: r.GetId(), Signature: sig, Error: s.failed(err)}
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

// Fail returns the error for a failure of a class, as a backend returns it: text may reach callers and says nothing of
// the device's own words; cause stays in the daemon's log.
func Fail(class signer.Class, cause error, text string) error {
	what := ""
	if cause != nil {
		what = cause.Error()
	}
	return fault.Wrap(class.Code(), &remoteError{class, what}, "%s", text)
}
