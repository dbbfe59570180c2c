#define COOPER_USERNS_ENV "_COOPER_USERNS"
#define COOPER_NO_USERNS_ENV "_COOPER_NO_USERNS"

enum { STEP_UNSHARE = 1, STEP_IDS, STEP_PRIVATE, STEP_DEATH };

// cooper_userns_entered returns what Enter wrote about the map, or NULL in a
// process that Enter did not start.
const char *cooper_userns_entered(void);
