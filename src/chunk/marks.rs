//! What is dirty, for somebody who only looks.

use std::fmt::Debug;
use std::ops::Range;

/// Tells which bytes are dirty and leaves them so: for reports to others, such as the dirty bitmap of an NBD export.
pub trait Marks: Debug + Send + Sync {
    /// The dirty ranges of `within`, in order, apart from each other, cut to `within`.
    ///
    /// Never blocks on a medium. What is written meanwhile may be named or not.
    fn marked(&self, within: Range<u64>) -> Vec<Range<u64>>;
}
