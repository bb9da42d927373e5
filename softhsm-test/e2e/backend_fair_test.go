package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/softhsm-test/lab"
)

// fairTurns is within how many turns of a device a request ends, its own included, however many others wait: the turn
// under way when it comes, one of somebody else, its own, one that begins before its reply is read, and two for the
// time that a machine takes which the flood keeps busy.
const fairTurns = 6

// TestFairness is T-DEV-4. It has one caller flood a key on a signer of 50 signatures a second.
func TestFairness(t *testing.T) { fairness(t, 50, 20) }

// TestLongFairness is the same on a signer of 5 signatures a second, slower than a TPM.
func TestLongFairness(t *testing.T) {
	long(t)
	fairness(t, 5, 12)
}

// fairness has one caller flood a key with packets to be signed directly, and then with packets for batches. Another
// caller of the same key waits a few turns of the device at most. Turns are counted by the signer itself, so that the
// machine's pace does not matter.
func fairness(t *testing.T, rate, requests int) {
	l := start(t, withFaulty(t, lab.Options{NoTPM: true, Faulty: []lab.Faulty{{
		Name: "slow", Wraps: "soft", Parallel: 1,
		Script: fmt.Sprintf(`{"at":"Sign","do":"rate","per_second":%d}`+"\n"+`{"at":"Sign","do":"note"}`, rate),
	}}}))
	admin := client.NewAdmin(l.AdminSocket)
	defer admin.Close()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := lab.CopyFile(self, filepath.Join(l.Dir, flooder)); err != nil {
		t.Fatal(err)
	}
	root, other := uint32(0), uint32(bob)
	d, err := admin.AddAgent(t.Context(), api.AddAgentRequest{AgentID: "shared", Backend: "slow", Bindings: []api.Binding{
		{Selector: api.Selector{UID: &root}, Verbs: []string{"sign"}},
		{Selector: api.Selector{UID: &other}, Verbs: []string{"sign"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	for _, batchable := range []bool{false, true} {
		contend(t, l, d.AgentID, requests, batchable)
	}
}

// flooder is the name of the test's own binary in the lab's folder, where other users reach it.
const flooder = "flooder"

// What tells the flooder what to do.
const (
	envFlood, envAgent, envBatchable = "TRUSTD_TEST_FLOOD", "TRUSTD_TEST_AGENT", "TRUSTD_TEST_BATCHABLE"
)

// TestMain is also the main function of the process that floods the daemon.
func TestMain(m *testing.M) {
	if socket := os.Getenv(envFlood); socket != "" {
		floodDaemon(socket, os.Getenv(envAgent), os.Getenv(envBatchable) == "true")
		return
	}
	code := m.Run()
	if faultyDir != "" {
		_ = os.RemoveAll(faultyDir)
	}
	os.Exit(code)
}

// floodDaemon asks for as many signatures as it gets, with a thousand requests under way, until it is killed.
func floodDaemon(socket, agent string, batchable bool) {
	list := make([]api.SignPacketRequest, 256)
	for i := range list {
		list[i] = packetFor(agent)
		list[i].Batchable = &batchable
	}
	c := client.New(socket)
	for range 8 {
		go func() {
			for {
				c.SignPackets(context.Background(), list)
			}
		}()
	}
	select {}
}

// contend floods the key as another user, and has requests of this process signed meanwhile.
func contend(t *testing.T, l *lab.Lab, agent string, requests int, batchable bool) {
	ctx, cancel := context.WithCancel(t.Context())
	var flood sync.WaitGroup
	defer flood.Wait()
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(l.Dir, flooder))
	cmd.Env = []string{
		envFlood + "=" + l.AgentSocket, envAgent + "=" + agent, envBatchable + "=" + strconv.FormatBool(batchable),
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: bob, Gid: bob, Groups: []uint32{}}}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Error(err)
		return
	}
	flood.Go(func() { _ = cmd.Wait() }) // it is killed
	c, admin := client.New(l.AgentSocket), client.NewAdmin(l.AdminSocket)
	defer c.Close()
	defer admin.Close()
	ok := poll(ctx, func() bool {
		b, err := admin.ShowBackend(ctx, "slow")
		return err == nil && b.Waiting > 100
	})
	if !ok {
		t.Error("the flood never came")
		return
	}
	most := 0
	for range requests {
		r := packetFor(agent)
		r.Batchable = &batchable
		before := l.Notes("slow")
		begun := time.Now()
		if _, err := c.SignPacket(ctx, r); err != nil {
			t.Errorf("beside a flood: %v", err)
			return
		}
		turns := l.Notes("slow") - before
		if turns > fairTurns {
			t.Errorf("batchable %t: a request took %d turns of the device, %v", batchable, turns, time.Since(begun))
		}
		most = max(most, turns)
	}
	t.Logf("batchable %t: %d turns at most", batchable, most)
}

// poll calls fn until it is true, for up to a minute.
func poll(ctx context.Context, fn func() bool) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !fn() {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
	}
	return true
}
