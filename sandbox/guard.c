// The guard outlives the builder for the moment that it takes to kill a command
// which got rid of its death signal: changing ids does that, as su does, and
// so does prctl. It is this program again, ended in a constructor, before the
// Go runtime begins, so that a RUN pays for one execve and no more. Every
// other start of the program pays for one getenv.

#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "guard.h"

enum { BUILDER = 3, COMMAND = 4 }; // descriptors, in the order of guard's ExtraFiles

__attribute__((constructor)) static void guard(void)
{
	struct pollfd watched[] = {
		{ .fd = BUILDER }, // a pipe that the builder alone holds open; its end is always told
		{ .fd = COMMAND, .events = POLLIN }, // the command's pidfd
	};
	sigset_t all;

	if (getenv(COOPER_GUARD_ENV) == NULL)
		return;
	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, NULL); // what ends the builder must not end the guard first
	prctl(PR_SET_NAME, "cooper-guard", 0, 0, 0);
	while (poll(watched, 2, -1) < 0)
		if (errno != EINTR)
			break; // better the command dies than that nobody watches it
	if (!(watched[1].revents & POLLIN))
		syscall(SYS_pidfd_send_signal, COMMAND, SIGKILL, NULL, 0);
	_exit(0);
}
