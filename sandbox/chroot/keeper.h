#define COOPER_CHROOT_ENV "_COOPER_CHROOT"

// cooper_chroot_child says whether this process is to become a command.
int cooper_chroot_child(void);
