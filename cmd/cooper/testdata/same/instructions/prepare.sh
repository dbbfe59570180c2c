mkdir archive
tar --owner=77 --group=88 --mtime=@1600000000 --sort=name -czf archive/tree.tar.gz tree
