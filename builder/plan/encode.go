package plan

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"time"
	"unicode/utf8"
)

// Encode writes down what op means: equal bytes for equal work, in every
// process and on every machine, and different bytes for different work. A step
// that op reads is written as its place in Inputs(op), never as its number, so
// a key is this text and the identities of the inputs in that order. The
// directory of a Local and proxies are left out.
func Encode(op Op) []byte {
	return encoder{inputs: Inputs(op)}.encode(op)
}

// EncodeAction is Encode for one action, whose inputs are From and NamesFrom.
func EncodeAction(a Action) []byte {
	return encoder{inputs: distinct(actionInputs(a))}.encode(a)
}

type encoder struct{ inputs []Ref }

func (e encoder) encode(v any) []byte {
	b, err := json.Marshal(e.tagged(reflect.ValueOf(v)))
	if err != nil {
		// a tree of maps, slices, strings, numbers and booleans always encodes
		return fmt.Appendf(nil, "%#v", v)
	}
	return b
}

// plain turns a value into what encoding/json writes in one way only: maps
// are sorted by it, and a string that is no text is marked as such, because it
// would write the same character for every bad byte.
func (e encoder) plain(v reflect.Value) any {
	switch x := v.Interface().(type) {
	case Ref:
		return slices.Index(e.inputs, x) // -1 for Scratch
	case time.Time:
		return x.UnixNano()
	case []byte:
		return x
	}
	switch v.Kind() {
	case reflect.Struct:
		return e.fields(v)
	case reflect.Slice:
		list := make([]any, v.Len())
		for i := range list {
			list[i] = e.plain(v.Index(i))
		}
		return list
	case reflect.Pointer:
		if v.IsNil() {
			return nil
		}
		return e.plain(v.Elem())
	case reflect.Interface:
		return e.tagged(v.Elem())
	case reflect.String:
		if s := v.String(); !utf8.ValidString(s) {
			return map[string]any{"bytes": []byte(s)}
		}
		return v.String()
	case reflect.Bool:
		return v.Bool()
	case reflect.Uint32: // os.FileMode and modes of mounts
		return v.Uint()
	default:
		return v.Int()
	}
}

// tagged adds the name of the type, where the type is part of the meaning.
func (e encoder) tagged(v reflect.Value) any {
	return map[string]any{v.Type().Name(): e.plain(v)}
}

func (e encoder) fields(v reflect.Value) any {
	m := map[string]any{}
	for i := range v.NumField() {
		if f := v.Type().Field(i); f.Tag.Get("encode") != "-" {
			m[f.Name] = e.plain(v.Field(i))
		}
	}
	return m
}
