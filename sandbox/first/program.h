enum { CONTROL = 3, PROGRAM_FILE = 4, CALLS = 5, GIVEN = 6 }; // descriptors, in the order of Channel.Files

enum { MAX_TOLERATED = 4 };

enum { BEFORE = -1 }; // as the index of a call: none was made yet

// struct call is a system call as the builder writes it down. Offsets count from the beginning of what it writes.
struct call {
	long number;
	long least;         // the smallest result that is success
	unsigned long args[6];
	unsigned int loads; // bit n: argument n is the offset of a result
	unsigned int keep;  // the offset to which the result goes, or 0
	int tolerated[MAX_TOLERATED];
	unsigned int skip; // how many of the next calls are left out after a tolerated error
	unsigned int unused;
};

struct calls {
	unsigned long given; // how many descriptors there are from GIVEN on
	unsigned long count;
	unsigned long pointers; // how many there are, and where: each is the offset of an offset that becomes an address
	unsigned long pointers_at;
	struct call call[];
};

// struct program is the code of the first process.
struct program {
	const void *code;
	unsigned long size;
	unsigned long entry; // an offset
};

struct program cooper_first_program(void);
