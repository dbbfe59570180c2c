package sandbox_test

func probe() {}
