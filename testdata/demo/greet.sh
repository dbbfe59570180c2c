#!/bin/sh
echo "@GREETING@ from $(id -un 2>/dev/null || id -u)"
[ ! -r "${WORDS:-}" ] || head -n 3 "$WORDS"
