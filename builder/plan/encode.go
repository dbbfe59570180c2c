package plan

import (
	"encoding/json"
	"fmt"
	"reflect"
	"time"
	"unicode/utf8"
)

// Encode writes down what op means: equal bytes for equal work, in every
// process and on every machine. It leaves out the numbers of other steps, which
// the caller must put in its own way, the directory of a Local, and proxies.
func Encode(op Op) []byte {
	b, err := json.Marshal(tagged(reflect.ValueOf(op)))
	if err != nil {
		// a tree of maps, slices, strings, numbers and booleans always encodes
		return fmt.Appendf(nil, "%#v", op)
	}
	return b
}

var (
	refType  = reflect.TypeFor[Ref]()
	refsType = reflect.TypeFor[[]Ref]()
	timeType = reflect.TypeFor[time.Time]()
)

// plain turns a value into what encoding/json writes in one way only: maps
// are sorted by it, and bytes that are no text are marked as such, because it
// would replace them all by the same character.
func plain(v reflect.Value) any {
	switch {
	case v.Type() == timeType:
		return v.Interface().(time.Time).UnixNano()
	case v.Type() == reflect.TypeFor[[]byte]():
		return v.Bytes()
	}
	switch v.Kind() {
	case reflect.Struct:
		return fields(v)
	case reflect.Slice:
		list := make([]any, v.Len())
		for i := range list {
			list[i] = plain(v.Index(i))
		}
		return list
	case reflect.Pointer:
		if v.IsNil() {
			return nil
		}
		return plain(v.Elem())
	case reflect.Interface:
		return tagged(v.Elem())
	case reflect.String:
		if s := v.String(); !utf8.ValidString(s) {
			return map[string]any{"bytes": []byte(s)}
		}
		return v.String()
	default:
		return v.Interface()
	}
}

// tagged adds the name of the type, where the type is part of the meaning.
func tagged(v reflect.Value) any {
	return map[string]any{v.Type().Name(): plain(v)}
}

func fields(v reflect.Value) any {
	m := map[string]any{}
	for i := range v.NumField() {
		f := v.Type().Field(i)
		if f.Tag.Get("encode") == "-" || f.Type == refType || f.Type == refsType {
			continue
		}
		m[f.Name] = plain(v.Field(i))
	}
	return m
}
