//! What tracking keeps in memory.

use std::fs;
use std::sync::Arc;

use kvm_ioctls::Kvm;
use memferry::chunk::ChunkSize;
use memferry::dirty::DirtyTracker;
use vmm_integration::RamBuilder;
use vmm_integration::kvm::{DirtyLog, DirtyRing, Slot, Slots};

/// What trackers of a guest with `len` bytes and so many vCPUs keep, in parts of its memory, after a take.
///
/// The private memory that this process may write, before and after; and the rings, which are KVM's.
pub(crate) fn of_tracking(len: u64, vcpus: u32, rings: bool) -> f64 {
    let vm = Arc::new(Kvm::new().unwrap().create_vm().unwrap());
    // Nothing of it is touched.
    let memory = Arc::new(RamBuilder::new(len).in_memory::<()>().unwrap());
    let slots = Slot::one_a_region(&*memory, 0);
    let slots = Slots::register(Arc::clone(&vm), Arc::clone(&memory), slots).unwrap();
    let before = private();
    let mut kept = 0;
    let mut vcpu_fds = Vec::new();
    let trackers: Vec<Arc<dyn DirtyTracker>> = if rings {
        let entries = DirtyRing::entries_for(len, vcpus);
        let rings = DirtyRing::enable(&slots, entries, ChunkSize::PAGE).unwrap();
        for id in 0..vcpus {
            let vcpu = vm.create_vcpu(id.into()).unwrap();
            rings.add_vcpu(&vcpu).unwrap();
            vcpu_fds.push(vcpu);
        }
        kept += u64::from(entries) * 16 * u64::from(vcpus);
        DirtyRing::trackers(&rings)
    } else {
        let logs = DirtyLog::regions(&slots, ChunkSize::PAGE).unwrap();
        logs.into_iter().map(|log| Arc::new(log) as _).collect()
    };
    let mut taken = Vec::new();
    for tracker in &trackers {
        tracker.start().unwrap();
        taken.push(tracker.take().unwrap());
    }
    kept += private().saturating_sub(before);
    for tracker in &trackers {
        tracker.stop().unwrap();
    }
    ratio(kept, len)
}

#[expect(clippy::cast_precision_loss, reason = "a share")]
fn ratio(part: u64, whole: u64) -> f64 {
    part as f64 / whole as f64
}

fn private() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmData:"));
    let kib: u64 = line
        .unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    kib << 10
}
