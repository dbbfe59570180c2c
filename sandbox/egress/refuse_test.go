package egress_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/egress"
)

// refusedConn fails if conn carries data or err is none of a connection that nobody took.
func refusedConn(t *testing.T, gain string, conn *net.TCPConn, err error, way egress.Ability) {
	t.Helper()
	if err != nil {
		if !errors.Is(err, syscall.ECONNREFUSED) && !(way != egress.Held && errors.Is(err, syscall.ECONNRESET)) {
			t.Errorf("the connection failed with %v, want that it is refused at once", err)
		}
		return
	}
	defer conn.Close()
	if way == egress.Held {
		t.Error("connect succeeded before the connection was refused")
	}
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	_, writeErr := fmt.Fprint(conn, "GET / HTTP/1.0\r\n\r\n")
	b, err := io.ReadAll(conn)
	err = errors.Join(writeErr, err)
	if len(b) > 0 || !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("%s: read %q, %v", gain, b, err)
	}
}

func TestWhatIsCloseToTheMachineIsOutOfReach(t *testing.T) {
	var visits atomic.Int32
	secret := func(c *net.TCPConn) { visits.Add(1); fmt.Fprint(c, "credentials of the machine") }
	world.serve(t, 80, secret)
	for _, address := range []string{machine4.String() + ":80", "[" + machine6.String() + "]:80", "127.0.0.1:80", "[::1]:80"} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go serve(l, secret)
	}
	// the control: from the machine they can be reached
	for _, address := range []string{"169.254.169.254:80", "127.0.0.1:80", machine4.String() + ":80", "[fd00:ec2::254]:80"} {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatalf("%s cannot be reached from the machine, so this test would prove nothing: %v", address, err)
		}
		io.ReadAll(conn)
		conn.Close()
	}
	visits.Store(0)
	everyWay(t, func(t *testing.T, way egress.Ability) {
		for _, c := range []struct{ address, reason, gain string }{
			{"169.254.169.254", "cloud metadata", "the credentials of the machine's role in the cloud"},
			{"169.254.170.2", "cloud metadata", "the credentials of the machine's role in the cloud"},
			{"fd00:ec2::254", "cloud metadata", "the credentials of the machine's role in the cloud"},
			{"fd20:ce::254", "cloud metadata", "the credentials of the machine's role in the cloud"},
			{"100.100.100.200", "cloud metadata", "the credentials of the machine's role in the cloud"},
			{"168.63.129.16", "cloud metadata", "the configuration of the virtual machine"},
			{"169.254.1.1", "link-local", "devices on the machine's link"},
			{"fe80::1", "link-local", "devices on the machine's link"},
			{machine4.String(), "address of the machine", "services that trust the machine itself"},
			{machine6.String(), "address of the machine", "services that trust the machine itself"},
			{"::ffff:" + machine4.String(), "address of the machine", "services that trust the machine itself"},
			{"64:ff9b::a9fe:a9fe", "cloud metadata", "metadata through a NAT64 gateway"},
			{"64:ff9b::7f00:1", "loopback", "the machine's loopback through a gateway"},
			{"2002:a9fe:a9fe::1", "cloud metadata", "metadata through a 6to4 gateway"},
			{"0.1.2.3", "not the address of a host", "whatever the machine does with an odd address"},
		} {
			n := openBy(t, egress.Options{}, way)
			conn, err := n.dial(net.JoinHostPort(c.address, "80"))
			if errors.Is(err, syscall.EINVAL) && strings.HasPrefix(c.address, "fe80") {
				n.end(t) // the kernel does not even try without an interface
				continue
			}
			t.Run(c.address, func(t *testing.T) { refusedConn(t, "an attacker gets "+c.gain, conn, err, way) })
			n.end(t)
			if got := n.refused(t); !strings.Contains(got, c.reason) || !strings.Contains(got, "allow=") {
				t.Errorf("%s: the reason is %q, want it to say %q and what would allow it", c.address, got, c.reason)
			}
		}
	})
	if n := visits.Load(); n > 0 {
		t.Errorf("%d connections reached a service that only the machine may use", n)
	}
}

// 127.0.0.1 inside is not the machine's, whatever is said of it.
func TestLoopbackOfTheMachineIsNotTheLoopbackInside(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go serve(l, func(c *net.TCPConn) { fmt.Fprint(c, "secret") })
	everyWay(t, func(t *testing.T, way egress.Ability) {
		n := openBy(t, egress.Options{}, way)
		for _, address := range []string{l.Addr().String(), strings.Replace(l.Addr().String(), "127.0.0.1", "127.8.8.8", 1)} {
			if conn, err := n.dial(address); err == nil {
				conn.Close()
				t.Errorf("%s was reached: an attacker gets at services of the user, such as a database or an agent", address)
			}
		}
	})
}

// Our own listener is inside as well.
func TestListenerOfTheBuilderIsNoWayAround(t *testing.T) {
	n := open(t, egress.Options{})
	var table []byte
	if err := n.do(func() (err error) { table, err = os.ReadFile("/proc/thread-self/net/tcp"); return err }); err != nil {
		t.Fatal(err)
	}
	var ports []string
	for line := range strings.Lines(string(table)) {
		if hex, ok := strings.CutPrefix(strings.Fields(line)[1], "0100007F:"); ok && strings.Fields(line)[3] == "0A" {
			port, err := strconv.ParseUint(hex, 16, 16)
			if err != nil {
				t.Fatal(err)
			}
			ports = append(ports, fmt.Sprint(port))
		}
	}
	if len(ports) == 0 {
		t.Fatal("no listener was found, so this test would prove nothing")
	}
	for _, p := range ports {
		conn, err := n.dial("127.0.0.1:" + p)
		refusedConn(t, "a direct connection to the builder leads out", conn, err, egress.Redirected)
	}
}

func TestExactRuleLiftsARefusal(t *testing.T) {
	l, err := net.Listen("tcp", machine4.String()+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go serve(l, func(c *net.TCPConn) { fmt.Fprint(c, "registry") })
	address := l.Addr().String()
	for rule, allowed := range map[string]bool{address: true, machine4.String(): true, "*": false, "0.0.0.0/0": false, "198.51.100.0/24": false, machine4.String() + ":1": false} {
		n := open(t, egress.Options{Policy: rules(t, rule)})
		conn, err := n.dial(address)
		if (err == nil) != allowed {
			t.Errorf("allow=%s: connecting to the machine's %s gives %v", rule, address, err)
		}
		if err == nil {
			conn.Close()
		}
	}
}

func TestOnlyTCPAndDNSLeadOut(t *testing.T) {
	var packets net.PacketConn
	err := world.do(func() (err error) { packets, err = net.ListenPacket("udp", "[::]:443"); return err })
	if err != nil {
		t.Fatal(err)
	}
	defer packets.Close()
	n := open(t, egress.Options{})
	for _, address := range []string{good4 + ":443", "[" + good6 + "]:443", "8.8.8.8:53"} {
		var conn net.Conn
		if err := n.do(func() (err error) { conn, err = net.Dial("udp", address); return err }); err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, err := conn.Write([]byte("data"))
		if err == nil {
			conn.SetReadDeadline(time.Now().Add(5 * time.Second))
			_, err = conn.Read(make([]byte, 1))
		}
		if !errors.Is(err, syscall.EPERM) && !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("UDP to %s: %v, want that it is refused at once", address, err)
		}
	}
	packets.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	if _, from, err := packets.ReadFrom(make([]byte, 10)); err == nil {
		t.Errorf("a datagram from %s got out: an attacker has a channel that nobody watches", from)
	}
	deadline := time.Now().Add(5 * time.Second)
	for len(n.noted()) == 0 && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	if notes := n.noted(); len(notes) != 1 || !strings.Contains(notes[0], "UDP to "+good4+":443") {
		t.Errorf("notes are %q, want one that names the first datagram", notes)
	}
}

func TestFloodIsBounded(t *testing.T) {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	few := files
	few.Cur = 400 // of which an eighth is for connections
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	everyWay(t, func(t *testing.T, way egress.Ability) {
		var now, most atomic.Int32
		world.serve(t, 80, func(c *net.TCPConn) {
			for n := now.Add(1); ; {
				old := most.Load()
				if n <= old || most.CompareAndSwap(old, n) {
					break
				}
			}
			defer now.Add(-1)
			echo(c)
		})
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &few); err != nil {
			t.Fatal(err)
		}
		n := openBy(t, egress.Options{}, way)
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
			t.Fatal(err)
		}
		const flood = 120
		var measured, done sync.WaitGroup
		measured.Add(1)
		for range flood {
			done.Go(func() {
				conn, err := n.dial(good4 + ":80")
				if err != nil {
					t.Errorf("a connection beyond the limit was refused: %v", err)
					return
				}
				defer conn.Close()
				measured.Wait()
				conn.SetDeadline(time.Now().Add(20 * time.Second))
				fmt.Fprint(conn, "x")
				if _, err := conn.Read(make([]byte, 1)); err != nil {
					t.Errorf("a connection that had to wait got nothing: %v", err)
				}
			})
		}
		time.Sleep(500 * time.Millisecond)
		if got := most.Load(); got > 50 || got < 40 {
			t.Errorf("%d connections were open of at most 50: a command that opens many takes the builder's files", got)
		}
		measured.Done()
		done.Wait()
		if notes := strings.Join(n.noted(), "\n"); !strings.Contains(notes, "50 connections") {
			t.Errorf("notes are %q, want the limit named", notes)
		}
	})
}

func TestFloodOfQuestionsIsBounded(t *testing.T) {
	silent, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	n := open(t, egress.Options{Resolvers: resolvers(netip.MustParseAddrPort(silent.LocalAddr().String()))})
	var conn net.Conn
	if err := n.do(func() (err error) { conn, err = net.Dial("udp", "127.0.0.11:53"); return err }); err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	before := runtime.NumGoroutine()
	for i := range 5000 {
		conn.Write(question(t, uint16(i), fmt.Sprintf("n%d.example.", i)))
	}
	time.Sleep(200 * time.Millisecond)
	if got := runtime.NumGoroutine() - before; got > 200 {
		t.Errorf("5000 questions made %d goroutines: a command can exhaust the builder's memory", got)
	}
	start := time.Now()
	n.end(t)
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("the end took %s while a resolver is silent", took)
	}
}

func TestNetworkEndsWithoutATrace(t *testing.T) {
	go http.Serve(world.listen(t, 80), web("good"))
	use := func() {
		n := open(t, egress.Options{})
		idle, err := n.dial(good4 + ":80")
		if err != nil {
			t.Fatal(err)
		}
		n.end(t)
		idle.Close()
	}
	use()
	time.Sleep(100 * time.Millisecond)
	goroutines, files := runtime.NumGoroutine(), openFiles(t)
	for range 5 {
		use()
	}
	deadline := time.Now().Add(5 * time.Second) // the server's side ends when it hears of it
	for time.Now().Before(deadline) && (runtime.NumGoroutine() > goroutines || openFiles(t) > files) {
		time.Sleep(20 * time.Millisecond)
	}
	if got := runtime.NumGoroutine(); got > goroutines {
		b := make([]byte, 1<<20)
		t.Errorf("5 networks left %d goroutines\n%s", got-goroutines, b[:runtime.Stack(b, true)])
	}
	if got := openFiles(t); got > files {
		t.Errorf("5 networks left %d descriptors", got-files)
	}
}

func TestLastWordsAreStillDelivered(t *testing.T) {
	const size = 300 << 10
	got := make(chan int, 1)
	world.serve(t, 80, func(c *net.TCPConn) {
		time.Sleep(50 * time.Millisecond)
		n, _ := io.Copy(io.Discard, c)
		got <- int(n)
	})
	for range 20 {
		n := open(t, egress.Options{})
		conn, err := n.dial(good4 + ":80")
		if err != nil {
			t.Fatal(err)
		}
		conn.Write(make([]byte, size))
		conn.Close() // and the command ends
		n.end(t)
		if n := <-got; n != size {
			t.Fatalf("%d of %d bytes arrived that a command had sent before it ended", n, size)
		}
	}
}

// Also of a connection that was made a moment ago.
func TestLastWordsOfANewConnection(t *testing.T) {
	got := make(chan string, 1)
	world.serve(t, 80, func(c *net.TCPConn) {
		b, _ := io.ReadAll(c)
		got <- string(b)
	})
	for range 100 {
		n := open(t, egress.Options{})
		conn, err := n.dial(good4 + ":80")
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(conn, "done")
		conn.Close()
		n.end(t)
		if s := <-got; s != "done" {
			t.Fatalf("%q arrived of what a command had sent before it ended", s)
		}
	}
}
