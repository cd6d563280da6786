//! What the kernel shows of a storage keeps its promises.

use std::fs::File;
use std::sync::{Arc, Mutex};

use memferry::backend::{FileStorage, MemoryStorage};
use memferry::chunk::conformance::storage::run_all;
use memferry::frontend::{Cache, FuseFile, FuseOptions};

fn the_file_keeps_all_promises(cache: Cache) {
    let mounts = Mutex::new(Vec::new());
    run_all(&|len| {
        let folder = tempfile::tempdir().unwrap();
        let options = FuseOptions {
            cache,
            ..FuseOptions::default()
        };
        let memory = Arc::new(MemoryStorage::new(len));
        let region = FuseFile::mount(memory, folder.path(), &options).unwrap();
        let file = File::options()
            .read(true)
            .write(true)
            .open(region.path())
            .unwrap();
        mounts.lock().unwrap().push((region, folder));
        Arc::new(FileStorage::new(file).unwrap())
    });
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn a_region_as_a_file_that_is_cached() {
    the_file_keeps_all_promises(Cache::Writeback);
}

#[test]
#[ignore = "privileged: needs root and /dev/fuse"]
fn a_region_as_a_file_that_is_not_cached() {
    the_file_keeps_all_promises(Cache::Direct);
}
