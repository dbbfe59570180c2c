// COOPER_FIRST_ENV tells a start of this program that it is the first process of a sandbox.
#define COOPER_FIRST_ENV "COOPER_SANDBOX_FIRST"

enum { CONTROL = 3, CALLS = 4, GIVEN = 5 }; // descriptors, in the order of Channel.Files

enum { MAX_TOLERATED = 4 };

// struct call is a system call as the builder writes it down. Offsets count from the beginning of what it writes.
struct call {
	long number;
	long least;         // the smallest result that is success
	unsigned long args[6];
	unsigned int loads; // bit n: argument n is the offset of a result
	unsigned int keep;  // the offset to which the result goes, or 0
	int tolerated[MAX_TOLERATED];
};

struct calls {
	unsigned long given; // how many descriptors there are from GIVEN on
	unsigned long count;
	unsigned long pointers; // how many there are, and where: each is the offset of an offset that becomes an address
	unsigned long pointers_at;
	struct call call[];
};
