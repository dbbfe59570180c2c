package policy

import (
	"encoding/hex"
	"fmt"
	"strings"
)

// capabilities names the bits of a capability set, from linux/capability.h.
const capabilities = "chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable " +
	"net_bind_service net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot sys_ptrace " +
	"sys_pacct sys_admin sys_boot sys_nice sys_resource sys_time sys_tty_config mknod lease audit_write audit_control " +
	"setfcap mac_override mac_admin syslog wake_alarm block_suspend audit_read perfmon bpf checkpoint_restore"

// capNames spells what fileCaps returned as getcap does.
func capNames(caps string) string {
	sets, _, _ := strings.Cut(caps, "@")
	b, err := hex.DecodeString(sets)
	const length = 1 + 4*4 // the flag, then the low and high words of permitted and inheritable
	if err != nil || len(b) != length {
		return caps
	}
	names := strings.Fields(capabilities)
	var have []string
	for bit := range 64 {
		word := 1 + bit/32*8 // permitted comes before inheritable in each half
		at := word + bit%32/8
		if (b[at]|b[at+4])&(1<<(bit%8)) == 0 {
			continue
		}
		if bit < len(names) {
			have = append(have, "cap_"+names[bit])
		} else {
			have = append(have, fmt.Sprint(bit))
		}
	}
	return strings.Join(have, ",")
}
