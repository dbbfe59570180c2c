// Package ladder builds images in the places that people run builders in, and compares what comes out.
//
// It is a test alone, behind the build tag "ladder", because it takes root: it stands up throw-away containers with runc as a
// kubelet with containerd would, each with other identities, capabilities and filters, and runs cooper in them. `make test-ladder`
// starts it; docs/kubernetes.md has the pods.
package ladder
