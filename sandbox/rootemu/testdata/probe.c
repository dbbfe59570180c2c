// What the tests run inside: it makes system calls as programs do and prints what comes of them, one line each. With
// real ids the kernel answers, with one id the supervisor, and the lines must be equal.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/openat2.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

static const char *result(long r) {
	static char text[64];
	if (r >= 0) snprintf(text, sizeof text, "%ld", r);
	else snprintf(text, sizeof text, "%s", strerrorname_np(errno));
	return text;
}

static void say(const char *what, long r) { printf("%s: %s\n", what, result(r)); }

static void owner(const char *what, const char *path) {
	struct stat st;
	if (lstat(path, &st)) { say(what, -1); return; }
	printf("%s: %o %d:%d\n", what, st.st_mode, st.st_uid, st.st_gid);
}

static void who(const char *what) {
	uid_t r, e, s, f = setfsuid(-1);
	gid_t rg, eg, sg, fg = setfsgid(-1);
	getresuid(&r, &e, &s);
	getresgid(&rg, &eg, &sg);
	printf("%s: %d %d %d %d / %d %d %d %d\n", what, r, e, s, f, rg, eg, sg, fg);
}

// forked waits for its own child only: as process 1 it is everybody's parent.
static int forked(void) {
	fflush(stdout);
	pid_t child = fork();
	if (child) waitpid(child, NULL, 0);
	return !child;
}

// AS runs a block in a child that is somebody.
#define AS(uid, gid) for (int once = forked(); once; fflush(stdout), _exit(0)) \
	if (setgroups(0, NULL) || setresgid(gid, gid, gid) || setresuid(uid, uid, uid)) perror("become"), _exit(1); else

static void make(const char *path) { close(open(path, O_CREAT | O_WRONLY | O_EXCL, 0644)); }

// ids tries every call that changes ids in every state that it can be made from.
static void ids(int group) {
	static const int states[][3] = {{0, 0, 0}, {1, 1, 1}, {1, 0, 2}, {0, 1, 2}, {1, 2, 0}, {1, 2, 1}};
	static const char *calls[] = {"set", "setre", "setres", "setfs"};
	static const int numbers[][4] = {{SYS_setuid, SYS_setreuid, SYS_setresuid, SYS_setfsuid}, {SYS_setgid, SYS_setregid, SYS_setresgid, SYS_setfsgid}};
	for (size_t s = 0; s < sizeof states / sizeof *states; s++)
		for (int c = 0; c < 4; c++) {
			int n[] = {5, 25, 125, 5};
			for (int v = 0; v < n[c]; v++) {
				int a = v % 5 - 1, b = v / 5 % 5 - 1, d = v / 25 - 1;
				if (forked()) {
					// of the group's changes an unprivileged user makes half
					if (syscall(numbers[group][2], states[s][0], states[s][1], states[s][2])) _exit(1);
					if (group && v % 2 && setresuid(7, 7, 7)) _exit(1);
					long r = syscall(numbers[group][c], a, b, d);
					printf("%d %s %d %d %d privileged=%d: %s ", (int)s, calls[c], a, b, d, geteuid() == 0, result(r));
					who("");
					fflush(stdout);
					_exit(0);
				}
			}
		}
}

static void creation(void) {
	mkdir("/open", 0777), chmod("/open", 0777);
	mkdir("/sticky", 0777), chown("/sticky", 0, 40), chmod("/sticky", 02777);
	symlink("/open/through", "/open/dangling");
	make("/roots");
	AS(1000, 1001) {
		chdir("/open");
		make("/open/file");
		make("relative");
		make("../open/up");
		close(creat("/open/creat", 0600));
		close(open("/open/dangling", O_CREAT | O_WRONLY, 0600));
		struct open_how how = {.flags = O_CREAT | O_WRONLY, .mode = 0640};
		close(syscall(SYS_openat2, AT_FDCWD, "openat2", &how, sizeof how));
		int fd = open("/open", O_TMPFILE | O_RDWR, 0600);
		char name[32];
		snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
		say("linkat", linkat(AT_FDCWD, name, AT_FDCWD, "/open/tmpfile", AT_SYMLINK_FOLLOW));
		mkdir("dir", 0750);
		symlink("nowhere", "link");
		mkfifo("pipe", 0600);
		mknod("node", S_IFREG | 0600, 0);
		int s = socket(AF_UNIX, SOCK_STREAM, 0);
		struct sockaddr_un at = {AF_UNIX, "/open/socket"};
		say("bind", bind(s, (void *)&at, sizeof at));
		make("before");
		rename("before", "renamed");
		make("/sticky/file");
		mkdir("/sticky/dir", 0755);
		make("/sticky/dir/deeper");
		say("device", mknod("device", S_IFCHR | 0600, makedev(1, 3)));
		say("root's directory", open("/mine", O_CREAT | O_WRONLY, 0600));
		say("root's file", open("/roots", O_WRONLY));
		say("root's file to read", open("/roots", O_RDONLY) >= 0 ? 0 : -1);
		say("mkdir in root's", mkdir("/mine", 0700));
		say("symlink in root's", symlink("x", "/mine"));
		say("rename into root's", rename("/open/file", "/mine"));
		say("link into root's", link("/open/file", "/mine"));
		say("access", access("/roots", W_OK));
		say("access to read", access("/roots", R_OK));
		say("access to a directory", access("/", W_OK));
		say("access to own", access("/open/file", R_OK | W_OK));
		say("not there", open("/open/no/file", O_CREAT | O_WRONLY, 0600));
		say("there", open("/open/file", O_CREAT | O_EXCL | O_WRONLY, 0600));
	}
	say("device of root", mknod("/open/device", S_IFCHR | 0600, makedev(1, 3)));
	make("/sticky/root");
	const char *all[] = {"file", "relative", "up", "creat", "dangling", "through", "openat2", "tmpfile", "dir", "link", "pipe", "node", "socket", "renamed",
		"../sticky/file", "../sticky/dir", "../sticky/dir/deeper", "../sticky/root"};
	chdir("/open");
	for (size_t i = 0; i < sizeof all / sizeof *all; i++) owner(all[i], all[i]);
}

static void changes(void) {
	mkdir("/c", 0755), chdir("/c");
	make("f"), chmod("f", 06755);
	chown("f", 5, 6), owner("chown clears the bits", "f");
	chmod("f", 06755), chown("f", -1, -1), owner("chown to nobody clears them too", "f");
	chown("f", -1, 7), owner("group", "f");
	chown("f", 8, -1), owner("user", "f");
	link("f", "twin"), owner("other name", "twin");
	symlink("f", "l"), lchown("l", 9, 10), owner("link", "l"), owner("not what it leads to", "f");
	chown("l", 11, 12), owner("through the link", "f"), owner("not the link", "l");
	symlink("/c/f", "absolute"), chown("absolute", 13, 14), owner("through an absolute link", "f");
	chown("../c/./f", 15, 16), owner("by a path with dots", "f");
	mkdir("d", 02755), chown("d", 1, 2), owner("directory keeps its bits", "d");
	mkfifo("p", 0600), chown("p", 3, 4), owner("pipe", "p");
	rename("p", "q"), owner("renamed pipe", "q");
	rename("l", "m"), owner("renamed link", "m");
	int fd = open("f", O_RDONLY), d = open(".", O_PATH), path = open("f", O_PATH);
	fchown(fd, 20, 21), owner("fchown", "f");
	say("fchown of a path", fchown(path, 22, 22));
	fchownat(d, "f", 23, 24, 0), owner("fchownat", "f");
	fchownat(fd, "", 25, 26, AT_EMPTY_PATH), owner("fchownat of a descriptor", "f");
	fchownat(d, "m", 27, 28, AT_SYMLINK_NOFOLLOW), owner("fchownat of a link", "m");
	char name[32];
	snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
	chown(name, 30, 31), owner("by /proc/self/fd", "f");
	struct stat st, st2, st3;
	struct statx x;
	stat("f", &st), fstat(fd, &st2), fstatat(path, "", &st3, AT_EMPTY_PATH), statx(AT_FDCWD, "f", 0, STATX_BASIC_STATS, &x);
	printf("stats: %d %d %d %d, same file %d\n", st.st_uid, st2.st_gid, st3.st_uid, x.stx_gid, st.st_ino == st2.st_ino && st.st_dev == st3.st_dev && x.stx_ino == st.st_ino);
	unlink("twin"), unlink("f"), fstat(fd, &st), printf("unlinked: %d:%d\n", st.st_uid, st.st_gid);
	unlink("m"), symlink("x", "m"), owner("a new link is root's", "m");
	say("absent", chown("absent", 1, 1));
	say("bad address", chown((char *)8, 1, 1));
	make("own"), chown("own", 1000, 1001), chmod("own", 0644);
	AS(1000, 1001) {
		say("give away", chown("own", 0, -1));
		say("same", chown("own", 1000, 1001));
		say("foreign group", chown("own", -1, 5));
		say("another's", chown("d", 1000, -1));
		say("capability", setxattr("own", "security.capability", "\0\0\0\2\0\4\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 20, 0));
	}
	gid_t more[] = {5};
	if (forked()) {
		setgroups(1, more), setresgid(1001, 1001, 1001), setresuid(1000, 1000, 1000);
		say("own group", chown("own", -1, 5));
		fflush(stdout), _exit(0);
	}
	owner("own group", "own");
	say("capability of root", setxattr("own", "security.capability", "\0\0\0\2\0\4\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 20, 0));
	char list[256] = "";
	long n = listxattr("own", list, sizeof list);
	printf("attributes: %ld %s\n", n, list);
	chown("own", 1, 1);
	printf("after chown: %ld\n", (long)listxattr("own", list, sizeof list));
	symlink("x", "attr"), lchown("attr", 1, 1);
	printf("of a link: %ld %s\n", (long)llistxattr("attr", list, sizeof list), result(lgetxattr("attr", "security.capability", list, sizeof list)));
	static const char acl[] = "\2\0\0\0" "\1\0\7\0\377\377\377\377" "\4\0\5\0\377\377\377\377" "\10\0\5\0\4\0\0\0" "\20\0\6\0\377\377\377\377" "\40\0\1\0\377\377\377\377";
	mkdir("acl", 0700);
	say("access list", setxattr("acl", "system.posix_acl_access", acl, sizeof acl - 1, 0));
	owner("its mode", "acl"), chmod("acl", 0755);
	n = getxattr("acl", "system.posix_acl_access", list, sizeof list);
	printf("the list: %ld, mask %d", n, list[30]), n = listxattr("acl", list, sizeof list), printf(", %ld %s\n", n, n > 0 ? list : "");
	say("no list", removexattr("acl", "system.posix_acl_access"));
	say("gone", getxattr("acl", "system.posix_acl_access", list, sizeof list));
	setxattr("acl", "system.posix_acl_default", acl, sizeof acl - 1, 0);
	say("default list", getxattr("acl", "system.posix_acl_default", list, sizeof list));
	printf("record: %s\n", result(getxattr("own", "user.rootlesscontainers", list, sizeof list)));
	say("dot dot above the root", chdir("/"));
	chown("../../c/own", 40, 41), owner("by a path above the root", "/c/own");
	say("null", chown("/dev/null", 1, 1) < 0 ? 0 : 1);
}

static void *thread(void *unused) { return (void *)(long)getuid(); }

static void processes(const char *self) {
	chmod("/", 0755), mkdir("/p", 0777), chmod("/p", 0777), chdir("/p");
	AS(1000, 1001) {
		// the parents are gone before the child says anything
		int p[2];
		pipe(p);
		if (!fork()) {
			if (!fork()) {
				char c;
				close(p[1]);
				while (read(p[0], &c, 1) > 0) ;
				usleep(50000);
				printf("orphan: %d\n", getuid()), fflush(stdout);
			}
			_exit(0);
		}
		wait(NULL);
		close(p[1]), close(p[0]);
		usleep(200000);
		pthread_t t;
		void *uid;
		if ((errno = pthread_create(&t, NULL, thread, NULL))) say("thread", -1), fflush(stdout), _exit(1);
		pthread_join(t, &uid);
		printf("thread: %ld\n", (long)uid);
	}
	pid_t v = vfork();
	if (!v) syscall(SYS_setuid, 5), _exit(0);
	waitpid(v, NULL, 0);
	printf("after vfork: %d\n", getuid());
	struct rlimit l = {1, 2};
	printf("limit: %s ", result(setrlimit(RLIMIT_LOCKS, &l)));
	getrlimit(RLIMIT_LOCKS, &l);
	printf("%d\n", getuid());
	gid_t list[8], want[] = {9, 3, 5};
	printf("groups: %s ", result(setgroups(3, want)));
	printf("%s ", result(getgroups(8, list)));
	printf("%d %d %d ", list[0], list[1], list[2]);
	printf("%s ", result(getgroups(2, list)));
	printf("%s\n", result(getgroups(0, NULL)));
	setgroups(0, NULL);

	char command[256];
	snprintf(command, sizeof command, "cp %s tool; cp tool owned; cp tool gtool; chown 70:71 owned; chown 70:71 gtool; chmod 4755 tool owned; chmod 2755 gtool; printf '#!%s who\\n' >script; chmod 4755 script", self, self);
	system(command);
	AS(1000, 1001) {
		int modes = 0;
		for (const char **f = (const char *[]){"./tool", "./owned", "./gtool", "./script", "/probe", NULL}; *f; f++, modes++) {
			if (forked()) execl(*f, *f, "who", NULL), _exit(1);
		}
		if (forked()) prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), execl("./tool", "./tool", "who", NULL), _exit(1);
		say("cannot execute", execl("/p", "x", NULL));
		who("is who it was");
		int pair[2];
		struct sockaddr_un at = {AF_UNIX, "/p/s"};
		int listener = socket(AF_UNIX, SOCK_STREAM, 0);
		bind(listener, (void *)&at, sizeof at), listen(listener, 1);
		int c = socket(AF_UNIX, SOCK_STREAM, 0);
		connect(c, (void *)&at, sizeof at);
		pair[0] = accept(listener, NULL, NULL);
		struct ucred cred;
		socklen_t size = sizeof cred;
		say("peer", getsockopt(pair[0], SOL_SOCKET, SO_PEERCRED, &cred, &size));
		printf("peer is %d:%d, us %d\n", cred.uid, cred.gid, cred.pid == getpid());
		say("chroot", chroot("/p"));
	}
	mkdir("/jail", 0755), mkdir("/jail/etc", 0755);
	if (forked()) {
		make("/jail/etc/f"), chown("/jail/etc/f", 50, 51), make("/f"), symlink("/etc/f", "/jail/l");
		chroot("/jail"), chdir("/");
		owner("in a jail", "/etc/f");
		chown("/l", 52, 53), owner("by a link in it", "/etc/f");
		chown("../../etc/f", 54, 55), owner("by a path out of it", "etc/f");
		fflush(stdout), _exit(0);
	}
	owner("from outside", "/jail/etc/f");
	owner("outside", "/f");
}

static void first(const char *self) {
	gid_t list[8];
	who(self);
	int n = getgroups(8, list);
	printf("groups: %d %d %d\nHOME=%s\n", n, list[0], list[1], getenv("HOME"));
	make("/tmp/f"), owner("/tmp/f", "/tmp/f");
	say("back to root", setuid(0));
}

// capabilities makes a set the process's own.
static long capabilities(unsigned permitted, unsigned effective) {
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[2] = { { .permitted = permitted, .effective = effective } };
	return syscall(SYS_capset, &header, data);
}

// kept does as setpriv does: the user first, then, by the capabilities that it kept, the rest.
static void kept(const char *self) {
	const unsigned both = 1 << CAP_SETUID | 1 << CAP_SETGID;
	for (int keep = 0; keep < 2; keep++) if (forked()) {
		prctl(PR_SET_KEEPCAPS, keep);
		setresuid(1000, 1000, 1000);
		long raised = capabilities(both, both);
		say("group", raised ? raised : setresgid(1001, 1001, 1001));
		say("groups", raised ? raised : setgroups(0, NULL));
		capabilities(1 << CAP_SETGID, 1 << CAP_SETGID);
		say("user, after it gave that up", setresuid(0, 0, 0));
		say("group, which it did not", raised ? raised : setresgid(1002, 1002, 1002));
		if (forked()) {
			prctl(PR_SET_KEEPCAPS, 0);
			execl(self, "executed", "back", NULL), perror("exec"), _exit(1);
		}
		fflush(stdout), _exit(0);
	}
}

static void back(void) {
	say("group, as another program", setgid(0));
	say("user, as another program", setuid(0));
}

// invent is as many users as it can be, and in as many groups.
static void invent(void) {
	static gid_t list[65536];
	long r = 0;
	for (int i = 0; i < 65536; i++) list[i] = i;
	for (int i = 0; !r && i < 100000; i++) list[0] = 100000 + i, r = setgroups(65536, list);
	say("groups", r);
	setgroups(0, NULL);
	for (int i = 1, r = 0; !r && i < 100000; i++) if ((r = setresuid(i, -1, -1))) say("users", r);
	say("known", setresuid(1, -1, -1));
}

int main(int argc, char **argv) {
	const char *what = argc > 1 ? argv[1] : "";
	umask(022);
	if (!strcmp(what, "who")) who(argv[0]);
	else if (!strcmp(what, "first")) first(argv[0]);
	else if (!strcmp(what, "kept")) kept("/probe");
	else if (!strcmp(what, "back")) back();
	else if (!strcmp(what, "invent")) invent();
	else if (!strcmp(what, "users")) ids(0);
	else if (!strcmp(what, "groups")) ids(1);
	else if (!strcmp(what, "creation")) creation();
	else if (!strcmp(what, "changes")) changes();
	else if (!strcmp(what, "processes")) processes("/probe");
	return 0;
}
