// The one thing Go cannot do: unshare(CLONE_NEWUSER) needs a process with one
// thread, and a Go program has several before main. So the child that Enter
// starts does it here, in a constructor that runs before the Go runtime.
// Every other start of the program pays for one getenv.

#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "enter.h"

enum { CONTROL = 3 }; // the descriptor of Enter's ExtraFiles

static char *entered;

const char *cooper_userns_entered(void) { return entered; }

// report tells the parent how a step ended and stops here if it failed.
static void report(int32_t step, int failed)
{
	int32_t message[2] = { step, failed ? errno : 0 };

	if (write(CONTROL, message, sizeof(message)) != sizeof(message) || failed)
		_exit(125);
}

// await returns when the parent says so, and never when it is gone.
static void await(void)
{
	char go;
	ssize_t n;

	do {
		n = read(CONTROL, &go, 1);
	} while (n < 0 && errno == EINTR);
	if (n != 1)
		_exit(125);
}

__attribute__((constructor)) static void enter(void)
{
	const char *map = getenv(COOPER_USERNS_ENV);
	int stay = map == NULL; // where it is

	if (stay)
		map = getenv(COOPER_NO_USERNS_ENV);
	if (map == NULL)
		return;
	entered = strdup(map);
	unsetenv(COOPER_USERNS_ENV); // or a grandchild would take itself for a child
	unsetenv(COOPER_NO_USERNS_ENV);

	if (stay) {
		// What runs in a chroot sees no /proc. If it did, this is not for it to look into.
		prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
	} else {
		report(STEP_UNSHARE, unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0);
		await(); // the parent writes the id maps

		report(STEP_IDS, setresgid(0, 0, 0) != 0 || setresuid(0, 0, 0) != 0);
		report(STEP_PRIVATE, mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0);
	}

	// After the ids, because changing ids clears it. The parent's last word
	// comes after that, so it cannot die in between unnoticed.
	report(STEP_DEATH, prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) != 0);
	await();

	// We were executed as /proc/self/exe, and ps would call us "exe".
	prctl(PR_SET_NAME, program_invocation_short_name, 0, 0, 0);
	close(CONTROL);
}
