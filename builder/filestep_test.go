package builder

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestWhatIsCopiedFromASnapshotIsFoundInItsLayers: else every byte of a COPY --from passes through this process.
func TestWhatIsCopiedFromASnapshotIsFoundInItsLayers(t *testing.T) {
	store := newShelf(t).store
	base, err := store.Prepare(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer base.Discard()
	if err := os.WriteFile(filepath.Join(base.Dir(), "below"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	id, err := base.Commit(t.Context(), "below")
	if err != nil {
		t.Fatal(err)
	}
	on, err := store.Prepare(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer on.Discard()
	if err := os.WriteFile(filepath.Join(on.Dir(), "above"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if id, err = on.Commit(t.Context(), "above"); err != nil {
		t.Fatal(err)
	}
	view, err := store.View(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer view.Close()
	var found []string
	for _, dir := range shownBy(view).Layers {
		for _, name := range []string{"above", "below"} {
			if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
				found = append(found, name)
			}
		}
	}
	if want := []string{"above", "below"}; !slices.Equal(found, want) {
		t.Errorf("layers show %q, want %q, topmost first", found, want)
	}
}
