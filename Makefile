# make demo and make test do all the set-up they need; everything else is for people who work on cooper.

GO        ?= go
TAGS      := seccomp netgo osusergo containers_image_openpgp exclude_graphdriver_btrfs
FUZZTIME  ?= 10s
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2

# libseccomp and the starts of child processes need cgo; the static link keeps the result one file that runs anywhere.
export CGO_ENABLED := 1

.PHONY: build demo test test-ladder test-growth conformance lint fuzz bench bench-go deps bases clean

build: deps
	$(GO) build -trimpath -tags '$(TAGS)' -ldflags '-s -w -extldflags -static' -o cooper ./cmd/cooper

# Builds, signs and verifies testdata/demo as an unprivileged user, offline once the modules are there.
demo: build
	.ci/demo

# Every test, under the race detector, as a user with subordinate ids and as one without when root starts it.
# PKG narrows it to some packages, RUN to some tests; STRICT=1 fails on a skip that .ci/skips-allowed does not name.
test: deps
	GO='$(GO)' TAGS='$(TAGS)' PKG='$(PKG)' RUN='$(RUN)' STRICT='$(STRICT)' .ci/test

# Builds in containers as pods are, of every kind, and compares the digests; root starts it. RUN narrows it to some places.
test-ladder: deps
	GO='$(GO)' TAGS='$(TAGS)' RUN='$(RUN)' .ci/ladder

# Builds of 500 steps, 100,000 files, 8 GB and 1,000 builds on one store; root starts it. RUN narrows it, as in RUN=GrowthOfSteps.
test-growth: deps
	GO='$(GO)' TAGS='$(TAGS)' RUN='$(RUN)' .ci/growth

# Builds the cases of cmd/cooper/testdata/conformance with BuildKit and records what it makes of them; RUN narrows it.
conformance: deps
	GO='$(GO)' TAGS='$(TAGS)' RUN='$(RUN)' .ci/conformance

lint: deps
	@unformatted=$$(gofmt -l $$(find . -name '*.go' -not -path './.*')); \
	  [ -z "$$unformatted" ] || { echo "gofmt would change:"; echo "$$unformatted"; exit 1; }
	$(GO) vet -tags '$(TAGS) ladder growth' ./...
	$(GO) run $(STATICCHECK) -tags '$(TAGS) ladder growth' ./...
	$(GO) test -count=1 ./internal/arch

# Each fuzz target for FUZZTIME; go test takes one at a time.
fuzz: deps
	@set -e; for pkg in $$($(GO) list ./...); do \
	  for target in $$($(GO) test -tags '$(TAGS)' -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
	    echo "$$pkg $$target"; \
	    $(GO) test -tags '$(TAGS)' -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x $$pkg; \
	  done; \
	done

# Compares cooper with other builders and writes docs/benchmarks.md; BENCHFLAGS narrows it, as in .ci/bench.
bench: deps
	GO='$(GO)' TAGS='$(TAGS)' BENCHFLAGS='$(BENCHFLAGS)' .ci/bench

bench-go: deps
	$(GO) test -tags '$(TAGS)' -run '^$$' -bench . -benchmem ./...

# The base images of the tests. They are cached outside the repository, so this is quick the second time.
bases: deps
	$(GO) run ./internal/testimage/cmd/mkbase busybox debian clients multi busybox-386

deps:
	@.ci/deps

clean:
	rm -f cooper
