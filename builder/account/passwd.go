package account

import "errors"

// Passwd returns /etc/passwd of root, opened and bounded as for a lookup; nil when there is none.
func Passwd(root string) ([]byte, error) {
	content, err := read(root, passwdFile)
	if errors.Is(err, errNoFile) {
		return nil, nil
	}
	return content, err
}
