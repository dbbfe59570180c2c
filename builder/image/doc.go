// Package image moves images between registries, OCI layouts, archives and the store.
//
// It knows descriptors, manifests and where bytes are kept; it does not know what is in a layer, who signed
// an image, or whether policy likes it. Everything that comes from outside is a stranger's: digests are
// checked before they become paths or URLs, documents are bounded and must be exactly one kind of thing, and
// no reader gives its last byte before the digest is known to be right.
//
// A [Layout] is a directory that many processes may share and that survives a kill at any instant. A
// [Client] turns a reference into a [Source]. A [Sink] takes a [Publication] out of a Layout and makes it
// visible somewhere in one last step, so nobody ever sees half an image or an image without its signature.
package image
