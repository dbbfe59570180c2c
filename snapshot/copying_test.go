package snapshot

import "testing"

// TestCopying runs the tests of what snapshots do once more where nothing is mounted.
func TestCopying(t *testing.T) {
	for _, test := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"a step shows its parent", TestAStepShowsItsParentAndKeepsOnlyWhatChanged},
		{"a step on nothing", TestAStepOnNothing},
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
