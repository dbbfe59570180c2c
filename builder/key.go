package builder

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"hash"

	"github.com/cooper-build/cooper/snapshot"
)

// keyVersion is part of every key: raise it when the same cause may give another result, so that a store
// written by an older cooper is never asked the wrong question.
const keyVersion = "1"

// A hasher makes a snapshot.Key of a cause: its kind and every part that can change the result, each with
// its length, so that no two lists of parts run together.
type hasher struct{ h hash.Hash }

func newKey(kind string) hasher {
	k := hasher{sha256.New()}
	return k.str(keyVersion).str(kind)
}

func (k hasher) bytes(b []byte) hasher {
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(len(b)))
	k.h.Write(n[:])
	k.h.Write(b)
	return k
}

func (k hasher) str(s string) hasher { return k.bytes([]byte(s)) }

// value adds the JSON of v, which encodes maps in the order of their keys.
func (k hasher) value(v any) hasher {
	b, err := json.Marshal(v)
	if err != nil {
		// Only our own plain structs come here; a failure must still not make two causes equal.
		return k.str("unencodable: " + err.Error())
	}
	return k.bytes(b)
}

func (k hasher) sum() snapshot.Key { return snapshot.Key(hex.EncodeToString(k.h.Sum(nil))) }

func hashesKey(contextDir string) snapshot.Key { return newKey("context hashes").str(contextDir).sum() }

func createdKey(id snapshot.ID) snapshot.Key { return newKey("created").str(string(id)).sum() }
