package egress_test

import (
	"context"
	"io"
	"net"
	"testing"

	"github.com/cooper-build/cooper/sandbox/egress"
)

// The cost per RUN.
func BenchmarkOpen(b *testing.B) {
	for b.Loop() {
		n, err := egress.Open(context.Background(), egress.Options{})
		if err != nil {
			b.Fatal(err)
		}
		if err := n.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

func direct(address string) (*net.TCPConn, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

// ways are without a network of our own, and with it.
func ways(b *testing.B, f func(b *testing.B, dial func(string) (*net.TCPConn, error))) {
	b.Run("direct", func(b *testing.B) { f(b, direct) })
	b.Run("egress", func(b *testing.B) {
		n := open(b, egress.Options{})
		// one thread for all: entering the namespace is no part of what is measured
		err := n.do(func() error { f(b, direct); return nil })
		if err != nil {
			b.Fatal(err)
		}
	})
}

func BenchmarkConnect(b *testing.B) {
	world.serve(b, 80, echo)
	ways(b, func(b *testing.B, dial func(string) (*net.TCPConn, error)) {
		var x [1]byte
		for b.Loop() {
			conn, err := dial(good4 + ":80")
			if err != nil {
				b.Error(err)
				return
			}
			conn.Write(x[:])
			if _, err := conn.Read(x[:]); err != nil {
				b.Error(err)
			}
			conn.Close()
		}
	})
}

func BenchmarkDownload(b *testing.B) {
	world.serve(b, 80, func(c *net.TCPConn) {
		chunk := make([]byte, 256<<10)
		for {
			if _, err := c.Write(chunk); err != nil {
				return
			}
		}
	})
	ways(b, func(b *testing.B, dial func(string) (*net.TCPConn, error)) {
		conn, err := dial(good4 + ":80")
		if err != nil {
			b.Error(err)
			return
		}
		defer conn.Close()
		const size = 4 << 20
		b.SetBytes(size)
		buffer := make([]byte, size)
		for b.Loop() {
			if _, err := io.ReadFull(conn, buffer); err != nil {
				b.Error(err)
				return
			}
		}
	})
}
