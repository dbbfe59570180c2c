package snapshot

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/snapshot/layer"
)

// TestCopying runs the tests of what snapshots do once more where nothing is mounted.
func TestCopying(t *testing.T) {
	for _, test := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"a step shows its parent", TestAStepShowsItsParentAndKeepsOnlyWhatChanged},
		{"a step on nothing", TestAStepOnNothing},
		{"a result of before", TestAResultOfBeforeIsFound},
		{"root entry", TestTheRootHasAnEntryOnlyWhenItChanged},
		{"discard", TestDiscardLeavesNothing},
		{"many layers", TestManyLayersStack},
		{"opaque root", TestAnOpaqueRootHidesTheBase},
		{"implied parents", TestImpliedParentsKeepTheBasesAttributes},
		{"squash", TestSquashEqualsTheLayersInOrder},
		{"reroot", TestRerootRepeatsAChangeSetOnAnotherParent},
		{"wrong diff id", TestAWrongDiffIDLeavesNothing},
		{"next boot", TestWhatWasNotSyncedDoesNotOutliveTheBoot},
		{"cancelled", TestCancelledWorkLeavesNothing},
		{"cache directories", TestCacheDirectoriesStay},
		{"many processes", TestManyProcessesAndGoroutinesCommitTheSameIDs},
		{"killed", TestAKilledProcessLeavesAValidStore},
		{"temporaries of the living", TestOpenLeavesTheTemporariesOfTheLivingAlone},
		{"interrupted stream", TestAnInterruptedStreamLeavesNothing},
		{"flipped bit", TestAFlippedBitInAnyRecordIsFound},
		{"repair", TestVerifyRepairsWhatTheNextBuildMakesAgain},
		{"loss of power", TestALossOfPower},
		{"made again", TestAMadeAgainParentTakesItsChildrenWithIt},
		{"in use", TestWhatIsUsedStays},
		{"builds, prunes and kills", TestBuildsPrunesAndKillsTogether},
	} {
		t.Run(test.name, test.run)
	}
}

// TestATreeIsHandedOnAndBelievedOnlyWhenItFits looks at the inode of a file: the same tree has the same one.
func TestATreeIsHandedOnAndBelievedOnlyWhenItFits(t *testing.T) {
	s := newCopyingStore(t)
	id := change(t, s, "", "first", func(dir string) { must(t, os.WriteFile(filepath.Join(dir, "a"), []byte("1"), 0o644)) })
	inode := func(s *Store) uint64 {
		t.Helper()
		v, err := s.View(t.Context(), id)
		must(t, err)
		defer v.Close()
		wantTree(t, list(t, v.Dir()), "a=1")
		var st unix.Stat_t
		must(t, unix.Stat(filepath.Join(v.Dir(), "a"), &st))
		return st.Ino
	}
	tree := inode(s)
	if again := inode(s); again != tree {
		t.Error("a tree that was only viewed was copied again")
	}
	v, err := s.View(t.Context(), id)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(v.Dir(), "a"), []byte("2"), 0o644))
	must(t, v.Close())
	inode(s) // compares the content
	must(t, layer.RemoveAll(s.treeDir(id)))
	must(t, os.MkdirAll(filepath.Join(s.treeDir(id), "merged"), 0o700))
	inode(s) // has no table
	var r treeRecord
	_, err = peekRecord(filepath.Join(s.treeDir(id), "table"), treeName(id), &r)
	must(t, err)
	r.Made = "another"
	must(t, s.writeRecord(filepath.Join(s.treeDir(id), "table"), treeName(id), r))
	must(t, os.WriteFile(filepath.Join(s.treeDir(id), "merged/a"), []byte("of another making"), 0o644))
	inode(s)
	wantEmptyTemp(t, s)
}
