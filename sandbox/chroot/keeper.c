// The keeper stands between the builder and a command that has no pid namespace, and does what the kernel does for one that has:
// when the command has ended, or the builder has, all that the command has started ends. It is this program again; the constructor
// forks before the Go runtime begins, so that only the child pays for that. Every other start of the program pays for one getenv.

#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "keeper.h"

enum { SOCKET = 3, BUILDER = 4, STATUS = 5 }; // descriptors, in the order of Start's ExtraFiles

static int child;

int cooper_chroot_child(void) { return child; }

// parent_of reads who made a process, or got it when that one ended.
static pid_t parent_of(const char *pid)
{
	char name[64], text[512], *at;
	ssize_t n;
	int fd;

	snprintf(name, sizeof(name), "/proc/%s/stat", pid);
	fd = open(name, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	n = read(fd, text, sizeof(text) - 1);
	close(fd);
	if (n <= 0)
		return 0;
	text[n] = 0;
	at = strrchr(text, ')'); // a name may hold anything, but it is short
	if (at == NULL || strlen(at) < 4)
		return 0;
	return atoi(at + 4);
}

// kill_children kills what is a child of ours at this moment. A number cannot come to mean another process: we have not waited for it.
static void kill_children(void)
{
	DIR *proc = opendir("/proc");
	struct dirent *e;
	pid_t self = getpid();

	if (proc == NULL)
		return;
	while ((e = readdir(proc)) != NULL)
		if (isdigit((unsigned char)e->d_name[0]) && parent_of(e->d_name) == self)
			kill(atoi(e->d_name), SIGKILL);
	closedir(proc);
}

// end_all ends every descendant. What loses its parent becomes a child of ours, and nothing can fork any more: the builder has
// closed what answers for that, or has died, which closes it as well. So each round leaves fewer.
static void end_all(void)
{
	for (;;) {
		kill_children();
		if (waitpid(-1, NULL, 0) < 0 && errno == ECHILD)
			return;
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
	}
}

__attribute__((constructor)) static void keep(void)
{
	struct pollfd watched[2] = { { .fd = BUILDER }, { .events = POLLIN } };
	struct signalfd_siginfo info;
	sigset_t all, before, chld;
	pid_t keeper = getpid(), first, pid;
	int status;

	if (getenv(COOPER_CHROOT_ENV) == NULL)
		return;
	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, &before); // what ends the builder must not end the keeper first
	prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
	if (prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0)
		_exit(255);
	first = fork();
	if (first < 0)
		_exit(255);
	if (first == 0) {
		close(BUILDER);
		close(STATUS);
		if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) != 0 || getppid() != keeper || setsid() < 0)
			_exit(255);
		sigprocmask(SIG_SETMASK, &before, NULL);
		child = 1;
		return;
	}
	prctl(PR_SET_NAME, "cooper-keeper", 0, 0, 0);
	close(SOCKET);
	close(STDOUT_FILENO);
	close(STDERR_FILENO);
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
