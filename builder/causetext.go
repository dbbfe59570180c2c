package builder

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/cooper-build/cooper/builder/plan"
)

// fieldText is the value of an operation's field as people write it; what is not set is empty.
func fieldText(name string, v any) string {
	switch name {
	case "Mode":
		return modeText(v)
	case "Owner":
		return ownerText(v)
	case "Network":
		if n, ok := v.(float64); ok {
			return plan.Network(n).String()
		}
	case "Insecure":
		if v == true {
			return "insecure"
		}
		return "sandbox"
	case "Hosts":
		if hosts, ok := decoded[[]plan.Host](v); ok {
			return listText(hosts, func(h plan.Host) string { return h.Name + "=" + h.IP })
		}
	case "Ulimits":
		if limits, ok := decoded[[]plan.Ulimit](v); ok {
			return listText(limits, func(l plan.Ulimit) string { return fmt.Sprintf("%s=%d:%d", l.Name, l.Soft, l.Hard) })
		}
	case "Timestamp":
		if nanoseconds, ok := v.(float64); ok {
			return strconv.FormatInt(int64(nanoseconds)/int64(time.Second), 10)
		}
	}
	return asText(v)
}

// modeText is what --chmod says: of a copy a number or changes, of what a step makes itself always a number.
func modeText(v any) string {
	if bits, ok := v.(float64); ok {
		return plan.Mode{Bits: uint32(bits)}.String()
	}
	if m, ok := decoded[plan.Mode](v); ok && v != nil {
		return m.String()
	}
	return asText(v)
}

// ownerText is what --chown says, with the group that it means when it names none.
func ownerText(v any) string {
	o, ok := decoded[plan.Owner](v)
	if !ok || v == nil {
		return asText(v)
	}
	user, group := o.UserName, o.GroupName
	if user == "" {
		user = strconv.Itoa(o.UID)
	}
	switch {
	case group == "" && o.GID == plan.GroupOfUser:
		return user
	case group == "":
		group = strconv.Itoa(o.GID)
	}
	return user + ":" + group
}

// epochText is SOURCE_DATE_EPOCH as the environment has it, of the time in a cause.
func epochText(value string) string {
	var epoch *time.Time
	switch err := json.Unmarshal([]byte(value), &epoch); {
	case err != nil:
		return value
	case epoch == nil:
		return "not set"
	}
	return strconv.FormatInt(epoch.Unix(), 10)
}

// decoded is a value of an operation in its own type again. It is not if a string in it is no text.
func decoded[T any](v any) (t T, ok bool) {
	err := json.Unmarshal([]byte(asJSON(v)), &t)
	return t, err == nil
}

func listText[T any](all []T, text func(T) string) string {
	var texts []string
	for _, one := range all {
		texts = append(texts, text(one))
	}
	return strings.Join(texts, ", ")
}

func asList(v any) []any {
	list, _ := v.([]any)
	return list
}

func asString(v any) string {
	s, _ := v.(string)
	return s
}

// asText is a value for people; what is not set is empty.
func asText(v any) string {
	switch v := v.(type) {
	case nil:
		return ""
	case string:
		return v
	case bool:
		if !v {
			return ""
		}
		return "yes"
	case []any:
		var all []string
		for _, one := range v {
			all = append(all, asText(one))
		}
		return strings.Join(all, ", ")
	case map[string]any:
		if platform, ok := v["Architecture"]; ok {
			return strings.Trim(asString(v["OS"])+"/"+asString(platform)+"/"+asString(v["Variant"]), "/")
		}
	}
	return asJSON(v)
}
