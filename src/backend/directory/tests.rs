use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::*;
use crate::chunk::Chunked;

const PAGE: u64 = 4096;

/// Goes away with its folder.
#[derive(Debug)]
struct Temporary<S>(
    S,
    #[expect(dead_code, reason = "removed on drop")] tempfile::TempDir,
);

fn temporary(chunk_size: ChunkSize, len: u64) -> Temporary<DirectoryStore> {
    let folder = tempfile::tempdir().unwrap();
    let store = DirectoryStore::open(folder.path().join("chunks"), chunk_size, len).unwrap();
    Temporary(store, folder)
}

impl ChunkStore for Temporary<DirectoryStore> {
    fn chunk_size(&self) -> ChunkSize {
        self.0.chunk_size()
    }
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn get(
        &self,
        chunks: &[ChunkIndex],
        found: &mut dyn FnMut(usize, Option<&[u8]>),
    ) -> io::Result<()> {
        self.0.get(chunks, found)
    }
    fn put(&self, chunks: &[(ChunkIndex, &[u8])]) -> io::Result<()> {
        self.0.put(chunks)
    }
    fn remove(&self, chunks: &[ChunkIndex]) -> io::Result<()> {
        self.0.remove(chunks)
    }
    fn present(&self, within: ChunkRun) -> io::Result<ChunkBitmap> {
        self.0.present(within)
    }
    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }
}

crate::chunk::conformance::store_conformance!(|size, len| Arc::new(temporary(size, len)) as _);

mod as_bytes {
    use super::*;
    crate::chunk::conformance::storage_conformance!(|len| {
        let large = ChunkSize::new(16 << 10).unwrap();
        Arc::new(Chunked::new(Arc::new(temporary(large, len)))) as _
    });
}

fn page_of(store: &DirectoryStore, chunk: u64) -> Option<u8> {
    let mut first = None;
    store
        .get(&[ChunkIndex(chunk)], &mut |_, bytes| {
            first = bytes.map(|bytes| bytes[0]);
        })
        .unwrap();
    first
}

fn put(store: &DirectoryStore, chunk: u64, byte: u8) {
    store.put(&[(ChunkIndex(chunk), &[byte; 4096])]).unwrap();
}

fn open(path: &Path) -> io::Result<DirectoryStore> {
    DirectoryStore::open(path, ChunkSize::PAGE, 10_000 * PAGE)
}

#[test]
fn what_was_put_is_there_when_the_folder_is_opened_again_flushed_or_not() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path()).unwrap();
    put(&store, 0, 1);
    put(&store, 5000, 1);
    store.flush().unwrap();
    put(&store, 5000, 2);
    put(&store, 5000, 3);
    put(&store, 9999, 4);
    store.remove(&[ChunkIndex(0)]).unwrap();
    drop(store);
    let store = open(folder.path()).unwrap();
    let found = [0, 5000, 9999, 1].map(|chunk| page_of(&store, chunk));
    assert_eq!(found, [None, Some(3), Some(4), None]);
    put(&store, 9999, 5);
    store.flush().unwrap();
    drop(store);
    let store = open(folder.path()).unwrap();
    assert_eq!(page_of(&store, 9999), Some(5));
    assert_eq!(fs::read_dir(store.new_folder()).unwrap().count(), 0);
    let present = store.present(ChunkRun::new(0, 10_000)).unwrap();
    assert_eq!(
        present.runs().map(|run| run.start.0).collect::<Vec<_>>(),
        [5000, 9999]
    );
}

#[test]
fn what_a_crash_left_half_written_is_thrown_away() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path()).unwrap();
    put(&store, 7, 1);
    store.flush().unwrap();
    drop(store);
    let new = folder.path().join("new");
    fs::write(new.join("7.3"), [2; 100]).unwrap();
    fs::write(new.join("8.9"), [8; 4096]).unwrap();
    fs::write(new.join("8.10"), [9; 4096]).unwrap();
    fs::write(new.join("ffffffff.1"), [8; 4096]).unwrap();
    fs::write(new.join("rubbish"), []).unwrap();
    let store = open(folder.path()).unwrap();
    assert_eq!(
        [7, 8].map(|chunk| page_of(&store, chunk)),
        [Some(1), Some(9)]
    );
    assert_eq!(fs::read_dir(&new).unwrap().count(), 1);
    put(&store, 8, 11);
    assert_eq!(page_of(&store, 8), Some(11));
}

#[test]
fn a_chunk_of_the_wrong_length_is_an_error_and_never_data() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path()).unwrap();
    put(&store, 7, 1);
    store.flush().unwrap();
    fs::write(store.place(7), [1; 4095]).unwrap();
    let error = store.get(&[ChunkIndex(7)], &mut |_, _| ()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    put(&store, 7, 2);
    assert_eq!(page_of(&store, 7), Some(2));
}

#[test]
fn a_folder_of_other_chunks_or_of_others_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path()).unwrap();
    let busy = open(folder.path()).unwrap_err();
    assert_eq!(busy.kind(), io::ErrorKind::ResourceBusy);
    drop(store);
    for (size, len) in [(4096, PAGE), (8192, 10_000 * PAGE)] {
        let size = ChunkSize::new(size).unwrap();
        let error = DirectoryStore::open(folder.path(), size, len).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
    }
    assert!(open(folder.path()).is_ok());
    let others = tempfile::tempdir().unwrap();
    fs::write(others.path().join("letter"), "dear").unwrap();
    let error = open(others.path()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
    assert_eq!(fs::read_dir(others.path()).unwrap().count(), 1);
}

/// A kernel that failed to write a file's bytes reports it to one sync and calls the file clean at the next.
#[test]
fn a_flush_after_a_failed_one_writes_again_what_may_be_lost() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path()).unwrap();
    put(&store, 1, 1);
    store.flush().unwrap();
    for many in [1, 300] {
        for chunk in 0..many {
            put(&store, chunk, 2);
        }
        let inode = |store: &DirectoryStore| {
            let put = store.state().pending[&0];
            fs::metadata(store.new_place(0, put)).unwrap().ino()
        };
        store.sync_fails.store(true, Ordering::Relaxed);
        let before = inode(&store);
        assert!(store.flush().is_err());
        assert!(store.flush().is_err(), "nothing is well yet");
        assert_eq!(page_of(&store, 0), Some(2), "readers see it all the same");
        assert_ne!(inode(&store), before, "written again");
        store.sync_fails.store(false, Ordering::Relaxed);
        store.flush().unwrap();
        assert!(store.state().pending.is_empty() && store.state().doubtful.is_empty());
        assert_eq!(page_of(&store, 0), Some(2));
    }
}

#[test]
fn what_an_earlier_process_left_is_written_again_before_it_is_taken_for_durable() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path()).unwrap();
    put(&store, 7, 1);
    store.sync_fails.store(true, Ordering::Relaxed);
    assert!(store.flush().is_err());
    drop(store);
    let store = open(folder.path()).unwrap();
    assert_eq!(store.state().doubtful, BTreeSet::from([7]));
    store.flush().unwrap();
    assert!(store.state().pending.is_empty() && store.state().doubtful.is_empty());
    assert_eq!(page_of(&store, 7), Some(1));
}

#[test]
fn a_flush_syncs_only_what_changed_since() {
    let store = temporary(ChunkSize::PAGE, 10_000 * PAGE);
    put(&store.0, 1, 1);
    put(&store.0, 5000, 1);
    store.flush().unwrap();
    assert_eq!(store.0.state().changed, BTreeSet::new());
    store.0.sync_fails.store(true, Ordering::Relaxed);
    store.flush().unwrap();
    store.0.sync_fails.store(false, Ordering::Relaxed);
    put(&store.0, 5000, 1);
    store.remove(&[ChunkIndex(1)]).unwrap();
    assert_eq!(store.0.state().changed, BTreeSet::from([0]));
    assert_eq!(store.0.state().pending.len(), 1);
    store.flush().unwrap();
    assert!(store.0.state().pending.is_empty());
}

#[test]
fn a_chunk_that_is_flushed_while_it_is_read_and_written_is_never_missing() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path()).unwrap();
    put(&store, 0, 1);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for round in 0..100 {
                put(&store, 0, round);
            }
        });
        let flusher = scope.spawn(|| {
            for _ in 0..100 {
                store.flush().unwrap();
            }
        });
        while !(writer.is_finished() && flusher.is_finished()) {
            assert!(page_of(&store, 0).is_some());
            assert_eq!(store.present(ChunkRun::new(0, 1)).unwrap().count(), 1);
        }
    });
}

#[test]
#[ignore = "privileged: needs root (mount)"]
fn a_full_disk_leaves_the_old_chunk() {
    let folder = tempfile::tempdir().unwrap();
    rustix::mount::mount(
        "tmpfs",
        folder.path(),
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        c"size=64k",
    )
    .unwrap();
    let outcome = std::panic::catch_unwind(|| {
        let store = open(folder.path()).unwrap();
        put(&store, 0, 1);
        store.flush().unwrap();
        let full = (1..100).find_map(|n| store.put(&[(ChunkIndex(n), &[2; 4096])]).err());
        assert_eq!(full.unwrap().kind(), io::ErrorKind::StorageFull);
        let full = store.put(&[(ChunkIndex(0), &[3; 4096])]).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        assert_eq!(page_of(&store, 0), Some(1));
        store.remove(&[ChunkIndex(1)]).unwrap();
        put(&store, 0, 4);
        assert_eq!(page_of(&store, 0), Some(4));
    });
    let detach = rustix::mount::UnmountFlags::DETACH;
    rustix::mount::unmount(folder.path(), detach).unwrap();
    outcome.unwrap();
}
