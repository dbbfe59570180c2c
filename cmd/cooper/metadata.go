package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/cooper-build/cooper/builder"
	"github.com/cooper-build/cooper/builder/plan"
	"github.com/cooper-build/cooper/sandbox"
)

// reports are the files that tell a program how a build ended.
type reports struct{ iidFile, metadataFile string }

// clear removes what an earlier build left, so that nobody takes it for the result of one that fails, and sees that the
// files can be written.
func (r reports) clear() error {
	for flag, file := range map[string]string{"--iidfile": r.iidFile, "--metadata-file": r.metadataFile} {
		if file == "" {
			continue
		}
		dir, err := os.Stat(filepath.Dir(file))
		if err != nil {
			return usageError{fmt.Errorf("%s %s: its directory: %w", flag, file, err)}
		}
		if !dir.IsDir() {
			return usageError{fmt.Errorf("%s %s: %s is not a directory", flag, file, filepath.Dir(file))}
		}
		info, err := os.Lstat(file)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return usageError{fmt.Errorf("%s: %w", flag, err)}
		}
		if info.Mode()&os.ModeSymlink == 0 && !info.Mode().IsRegular() {
			return usageError{fmt.Errorf("%s %s is not a regular file", flag, file)}
		}
		if err := os.Remove(file); err != nil {
			return usageError{fmt.Errorf("%s: %w", flag, err)}
		}
	}
	return nil
}

// imageID is what docker calls an image's id: the digest of its config, or of the index.
func imageID(r *builder.Result) digest.Digest {
	if r.Config.Digest != "" {
		return r.Config.Digest
	}
	return r.Image.Digest
}

// succeeded writes both files.
func (r reports) succeeded(result *builder.Result, names []string, carriesImage bool, more map[string]any) error {
	if r.iidFile != "" {
		if err := writeFile(r.iidFile, []byte(imageID(result))); err != nil {
			return fmt.Errorf("--iidfile: %w", err)
		}
	}
	m := maps.Clone(more)
	m["cooper.sandbox"] = result.Sandbox.Name()
	if carriesImage {
		m["containerimage.digest"] = result.Image.Digest
		m["containerimage.descriptor"] = result.Image
		if result.Config.Digest != "" {
			m["containerimage.config.digest"] = result.Config.Digest
		}
		if len(names) > 0 {
			m["image.name"] = strings.Join(names, ",")
		}
	}
	return r.writeMetadata(m)
}

// A failure is what the metadata file holds under cooper.failure.
type failure struct {
	Message  string `json:"message"`
	Step     string `json:"step,omitempty"`
	File     string `json:"file,omitempty"`
	Line     int    `json:"line,omitempty"`
	ExitCode *int   `json:"exitCode,omitempty"` // of a RUN
}

// failed writes what failed.
func (r reports) failed(cause error, step string, more map[string]any) error {
	f := failure{Message: cause.Error(), Step: step}
	var at *plan.Error
	if errors.As(cause, &at) {
		f.File, f.Line = at.Where.File, at.Where.Line()
	}
	var exit *sandbox.ExitError
	if errors.As(cause, &exit) {
		f.ExitCode = &exit.Code
	}
	m := maps.Clone(more)
	delete(m, "buildx.build.warnings") // of a result
	m["cooper.failure"] = f
	return r.writeMetadata(m)
}

func (r reports) writeMetadata(m map[string]any) error {
	if r.metadataFile == "" {
		return nil
	}
	text, err := json.MarshalIndent(m, "", "  ")
	if err == nil {
		err = writeFile(r.metadataFile, text)
	}
	if err != nil {
		return fmt.Errorf("--metadata-file: %w", err)
	}
	return nil
}

// writeFile gives a file its name when it is whole.
func writeFile(name string, text []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.Write(text)
	if err = errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}
