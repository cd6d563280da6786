//! Every storage keeps every promise, and so does what is put together from them.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use memferry::backend::nbd::{NbdUrl, Remote, RemoteOptions};
use memferry::backend::{DirectoryStore, MemoryStorage, memfd_storage};
use memferry::chunk::conformance::storage::run_all;
use memferry::chunk::{ChunkSize, Chunked, Cow, Gate, Storage, Synced};
use memferry::dirty::Tracked;
use memferry::frontend::nbd::{Export, Listener, Server, ServerOptions};
use memferry::mount::{Managed, ManagedOptions, Push};

/// No test waits longer for anything.
const SOON: Duration = Duration::from_secs(30);

fn large() -> ChunkSize {
    ChunkSize::new(64 << 10).unwrap()
}

fn memory(len: u64) -> Arc<dyn Storage> {
    Arc::new(MemoryStorage::new(len))
}

/// What has to outlive the storages of a test.
#[derive(Default)]
struct Kept(Mutex<Vec<(Option<Server>, tempfile::TempDir)>>);

impl Kept {
    fn folder(&self) -> std::path::PathBuf {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        self.0.lock().unwrap().push((None, folder));
        path
    }

    /// A client's view of `storage`, over a socket.
    fn over_nbd(&self, storage: Arc<dyn Storage>) -> Arc<dyn Storage> {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let server = Server::new(ServerOptions::default());
        server.add(Export::new("region", storage).unwrap()).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        server.listen(Listener::Unix(listener)).unwrap();
        let options = RemoteOptions {
            deadline: SOON,
            ..RemoteOptions::default()
        };
        let url = NbdUrl::unix(socket, "region").unwrap();
        let remote = Remote::connect(&url, &options).unwrap();
        self.0.lock().unwrap().push((Some(server), folder));
        Arc::new(remote)
    }
}

fn synced(remote: Arc<dyn Storage>, chunk_size: ChunkSize) -> Arc<dyn Storage> {
    let local = memory(remote.len());
    Arc::new(Synced::new(remote, local, chunk_size, SOON, Arc::new(())).unwrap())
}

#[test]
fn the_layers_of_a_front_end_together() {
    run_all(&|len| {
        let synced = synced(memory(len), large());
        let tracked = Arc::new(Tracked::new(synced, ChunkSize::PAGE));
        Arc::new(Gate::new(tracked))
    });
}

#[test]
fn a_clone_of_a_base_in_a_memfd_with_chunks_in_a_folder_over_it() {
    let kept = Kept::default();
    run_all(&|len| {
        let base = memfd_storage("base", len).unwrap();
        let store = DirectoryStore::open(kept.folder(), large(), len).unwrap();
        let overlay = Chunked::new(Arc::new(store));
        let (base, overlay) = (Arc::new(base), Arc::new(overlay));
        Arc::new(Cow::new(base, overlay, ChunkSize::PAGE).unwrap())
    });
}

#[test]
fn memory_behind_a_network_block_device() {
    let kept = Kept::default();
    run_all(&|len| kept.over_nbd(memory(len)));
}

#[test]
fn chunks_of_a_folder_behind_a_network_block_device_read_through() {
    let kept = Kept::default();
    run_all(&|len| {
        let store = DirectoryStore::open(kept.folder(), large(), len).unwrap();
        let remote = kept.over_nbd(Arc::new(Chunked::new(Arc::new(store))));
        synced(remote, ChunkSize::PAGE)
    });
}

/// With everything that goes on in the background of a mount.
#[test]
fn a_managed_mount_of_a_network_block_device() {
    let kept = Kept::default();
    run_all(&|len| {
        let remote = kept.over_nbd(memory(len));
        let options = ManagedOptions {
            push: Push::Every(Duration::from_millis(1)),
            deadline: SOON,
            ..ManagedOptions::default()
        };
        Arc::new(Managed::open(remote, memory(len), &options).unwrap())
    });
}

/// A region that is shown again by who has it: A → B → C.
#[test]
fn a_network_block_device_behind_another() {
    let kept = Kept::default();
    run_all(&|len| kept.over_nbd(kept.over_nbd(memory(len))));
}

/// What a later process finds in the folder and the map that an earlier one flushed.
#[test]
fn a_clone_and_its_folder_are_the_same_when_they_are_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let (overlay, map) = (folder.path().join("overlay"), folder.path().join("map"));
    let len = 300_000;
    let base = memory(len);
    base.write_all_at(&vec![1; 300_000], 0).unwrap();
    let open = || -> io::Result<Cow> {
        let over = |path, len| -> io::Result<Arc<dyn Storage>> {
            let store = DirectoryStore::open(path, ChunkSize::PAGE, len)?;
            Ok(Arc::new(Chunked::new(Arc::new(store))))
        };
        let map = over(&map, Cow::map_len(len, large()))?;
        Cow::with_map(base.clone(), over(&overlay, len)?, large(), map)
    };
    let clone = open().unwrap();
    clone.write_all_at(&[2; 100_000], 99_999).unwrap();
    clone.zero(250_000..260_000).unwrap();
    clone.flush().unwrap();
    let mut before = vec![9; 300_000];
    clone.read_exact_at(&mut before, 0).unwrap();
    let differing = clone.differing();
    drop(clone);
    let clone = open().unwrap();
    let mut after = vec![9; 300_000];
    clone.read_exact_at(&mut after, 0).unwrap();
    assert!(before == after);
    assert_eq!(clone.differing(), differing);
}
