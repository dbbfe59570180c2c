// The first process of a sandbox makes the system calls that the builder wrote down, in their order, and the last is execve.
//
// It is no part of this program but a program of its own, whose code lies in a section of this one, so that what starts for each
// command is a page and not a Go runtime, and a command that finds it in /proc/self/exe finds nothing of the builder (CVE-2019-5736).
// Hence no function here may call one of another file, a C library's included, or use data.

#include <linux/close_range.h>
#include <linux/errno.h>
#include <linux/fs.h>
#include <linux/mman.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>

#include "program.h"

// What else a compiler may call: memset, memcpy, and what ends a program whose stack was overwritten.
#define PROGRAM __attribute__((section("cooper_first"), optimize("no-tree-loop-distribute-patterns", "no-stack-protector")))

#if defined(__x86_64__)
#define ENTRY __attribute__((force_align_arg_pointer)) // the kernel's stack is not aligned as that of a function
static inline __attribute__((always_inline)) long call(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long result;

	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
	return result;
}
#elif defined(__aarch64__)
#define ENTRY
static inline __attribute__((always_inline)) long call(long number, long a, long b, long c, long d, long e, long f)
{
	register long x8 __asm__("x8") = number;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	register long x5 __asm__("x5") = f;

	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
	return x0;
}
#else
#error "this architecture's system calls are not written down here"
#endif

enum { MAX_ERRNO = 4095 };

static inline __attribute__((always_inline, noreturn)) void end(void)
{
	for (;;)
		call(SYS_exit_group, 255, 0, 0, 0, 0, 0);
}

// fail tells the builder which call failed and why. If it is gone, nobody needs to know.
static inline __attribute__((always_inline, noreturn)) void fail(uint32_t index, int32_t error)
{
	int32_t message[2] = { (int32_t)index, error };

	call(SYS_write, CONTROL, (long)message, sizeof(message), 0, 0, 0);
	end();
}

PROGRAM ENTRY __attribute__((noreturn, used)) static void run(void)
{
	long size = call(SYS_lseek, CALLS, 0, SEEK_END, 0, 0, 0);
	long base = call(SYS_mmap, 0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, CALLS, 0);
	struct calls *todo = (struct calls *)base;
	int32_t error = 0;

	if (size < 0 || (unsigned long)base >= (unsigned long)-MAX_ERRNO)
		end();
	if (call(SYS_close_range, PROGRAM_FILE, CALLS, 0, 0, 0, 0) < 0 || call(SYS_close_range, GIVEN + todo->given, ~0U, 0, 0, 0, 0) < 0 ||
	    call(SYS_close_range, CONTROL, ~0U, CLOSE_RANGE_CLOEXEC, 0, 0, 0) < 0)
		fail(BEFORE, 0);
	for (unsigned long i = 0; i < todo->pointers; i++)
		*(uint64_t *)(base + ((uint64_t *)(base + todo->pointers_at))[i]) += base;

	for (unsigned long i = 0; i < todo->count; i++) {
		struct call *c = &todo->call[i];
		long result;
		int tolerated = 0;

		for (int n = 0; n < 6; n++)
			if (c->loads & 1u << n)
				c->args[n] = *(int64_t *)(base + c->args[n]);
		result = call(c->number, c->args[0], c->args[1], c->args[2], c->args[3], c->args[4], c->args[5]);
		error = result < 0 && result >= -MAX_ERRNO ? -result : 0;
		for (int n = 0; n < MAX_TOLERATED; n++)
			if (error != 0 && c->tolerated[n] == error)
				tolerated = 1;
		if (result < c->least && !tolerated)
			fail(i, error);
		if (tolerated)
			i += c->skip;
		if (c->keep != 0)
			*(int64_t *)(base + c->keep) = result;
	}
	fail(todo->count, error); // none of the last ones executed anything
}

extern const char __start_cooper_first[], __stop_cooper_first[]; // the linker's

struct program cooper_first_program(void)
{
	struct program p = { __start_cooper_first, __stop_cooper_first - __start_cooper_first, (const char *)run - __start_cooper_first };

	return p;
}
