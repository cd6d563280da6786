//! What the kernel of the lab answers to the questions that the library asks of a kernel.

use memferry::sys::pagemap::{Pagemap, soft_dirty_works};

#[test]
#[ignore = "kernel: needs CONFIG_MEM_SOFT_DIRTY"]
fn soft_dirty_bits_are_found_where_a_kernel_has_them() {
    assert!(soft_dirty_works().unwrap());
}

#[test]
#[ignore = "kernel: needs PAGEMAP_SCAN, of Linux 6.7"]
fn a_kernel_that_can_scan_page_maps_does() {
    let memory = vec![1_u8; 1 << 20];
    let start = memory.as_ptr() as u64;
    let mut pages = 0;
    let whole_pages = start.next_multiple_of(4096)..(start + (1 << 20)) / 4096 * 4096;
    Pagemap::of_this_process()
        .unwrap()
        .present(whole_pages.clone(), &mut |range| {
            pages += (range.end - range.start) / 4096;
        })
        .unwrap();
    assert_eq!(pages, (whole_pages.end - whole_pages.start) / 4096);
}
