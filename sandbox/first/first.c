// The first process of a sandbox makes the system calls that the builder wrote down, in their order, and the last is execve. It is
// this program again, in a constructor, before the Go runtime begins: that and what it would initialise take longer than all the
// calls. Every other start of the program pays for one getenv.

#define _GNU_SOURCE
#include <errno.h>
#include <linux/close_range.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "first.h"

// fail tells the builder which call failed and why. If it is gone, nobody needs to know.
static void fail(uint32_t index, int error)
{
	int32_t message[2] = { index, error };

	if (write(CONTROL, message, sizeof(message)) != sizeof(message))
		_exit(254);
	_exit(255);
}

static int tolerated(const struct call *c, int error)
{
	for (int i = 0; i < MAX_TOLERATED; i++)
		if (c->tolerated[i] == error)
			return 1;
	return 0;
}

__attribute__((constructor(201))) static void first(void)
{
	struct stat st;
	struct calls *todo;
	char *base;
	int error = 0;

	if (getenv(COOPER_FIRST_ENV) == NULL)
		return;
	if (fstat(CALLS, &st) != 0)
		_exit(255);
	base = mmap(NULL, st.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, CALLS, 0);
	if (base == MAP_FAILED)
		_exit(255);
	todo = (struct calls *)base;
	if (syscall(SYS_close_range, CALLS, CALLS, 0) != 0 || syscall(SYS_close_range, GIVEN + todo->given, ~0U, 0) != 0 ||
	    syscall(SYS_close_range, CONTROL, ~0U, CLOSE_RANGE_CLOEXEC) != 0)
		_exit(255);
	for (unsigned long i = 0; i < todo->pointers; i++)
		*(uint64_t *)(base + ((uint64_t *)(base + todo->pointers_at))[i]) += (uint64_t)base;

	for (unsigned long i = 0; i < todo->count; i++) {
		struct call *c = &todo->call[i];
		long result;

		for (int n = 0; n < 6; n++)
			if (c->loads & 1u << n)
				c->args[n] = *(int64_t *)(base + c->args[n]);
		result = syscall(c->number, c->args[0], c->args[1], c->args[2], c->args[3], c->args[4], c->args[5]);
		error = result < 0 ? errno : 0;
		if (result < c->least && (error == 0 || !tolerated(c, error)))
			fail(i, error);
		if (c->keep != 0)
			*(int64_t *)(base + c->keep) = result;
	}
	fail(todo->count, error); // none of the last ones executed anything
}
