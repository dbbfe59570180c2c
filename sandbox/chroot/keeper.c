// The keeper stands between the builder and a command that has no pid namespace, and does what the kernel does for one that has:
// when the command has ended, or the builder has, all that the command has started ends. It is this program again; the constructor
// forks before the Go runtime begins, and the child executes the program that becomes the command (package first). Every other start of the program pays for one getenv.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "keeper.h"

enum { PROGRAM = 4, BUILDER = 7, STATUS = 8 }; // descriptors, in the order of Start's ExtraFiles; the others are the child's

enum { REFER = 1 << 13, SCOPE_SIGNAL = 1 << 1, PATH_BENEATH = 1 }; // as in linux/landlock.h, which may be older than the kernel

// confine_signals makes this process one whose signals reach its own descendants only. A command that is confined once more below
// cannot signal back. Files stay as they are; but moving and linking them is forbidden by any rules that do not allow it.
static int confine_signals(void)
{
	struct {
		uint64_t access_fs, access_net, scoped;
	} rules = { .access_fs = REFER, .scoped = SCOPE_SIGNAL };
	struct {
		uint64_t allowed;
		int32_t parent;
	} __attribute__((packed)) everywhere = { .allowed = REFER };
	int fd = syscall(SYS_landlock_create_ruleset, &rules, sizeof(rules), 0);

	everywhere.parent = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0 || everywhere.parent < 0 || syscall(SYS_landlock_add_rule, fd, PATH_BENEATH, &everywhere, 0) != 0 ||
	    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || syscall(SYS_landlock_restrict_self, fd, 0) != 0)
		return -1;
	close(everywhere.parent);
	close(fd);
	return 0;
}

// end_all ends every descendant. The kernel signals all of them with nobody forking in between, and what has a signal does not fork any
// more; whose signals reach nobody else may ask for that. What loses its parent becomes a child of ours.
static void end_all(void)
{
	do
		kill(-1, SIGKILL);
	while (waitpid(-1, NULL, 0) > 0 || errno != ECHILD);
}

__attribute__((constructor)) static void keep(void)
{
	struct pollfd watched[2] = { { .fd = BUILDER }, { .events = POLLIN } };
	struct signalfd_siginfo info;
	sigset_t all, before, chld;
	pid_t keeper = getpid(), first, pid;
	char *none[] = { NULL };
	int status;

	if (getenv(COOPER_CHROOT_ENV) == NULL)
		return;
	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, &before); // what ends the builder must not end the keeper first
	prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
	if (prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0 || confine_signals() != 0)
		_exit(255);
	first = fork();
	if (first < 0)
		_exit(255);
	if (first == 0) {
		if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) != 0 || getppid() != keeper || setsid() < 0)
			_exit(255);
		sigprocmask(SIG_SETMASK, &before, NULL);
		syscall(SYS_execveat, PROGRAM, "", none, none, AT_EMPTY_PATH);
		_exit(255);
	}
	prctl(PR_SET_NAME, "cooper-keeper", 0, 0, 0);
	close(STDOUT_FILENO);
	close(STDERR_FILENO);
	for (int fd = STDERR_FILENO + 1; fd < BUILDER; fd++)
		close(fd);
	sigemptyset(&chld);
	sigaddset(&chld, SIGCHLD);
	watched[1].fd = signalfd(-1, &chld, SFD_CLOEXEC | SFD_NONBLOCK);
	while (watched[1].fd >= 0) {
		if (poll(watched, 2, -1) < 0 && errno != EINTR)
			break; // better the command dies than that nobody watches it
		if (watched[0].revents)
			break;
		if (!watched[1].revents)
			continue;
		while (read(watched[1].fd, &info, sizeof(info)) > 0)
			;
		while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
			if (pid == first && write(STATUS, &status, sizeof(status)) != sizeof(status))
				break; // the builder is gone, which the poll will tell
	}
	end_all();
	_exit(0);
}
