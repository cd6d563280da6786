//! Telling zeros from other bytes.

/// So many bytes of zeros stay in the processor's nearest cache.
const PIECE: usize = 4 << 10;
static ZEROS: [u8; PIECE] = [0; PIECE];

/// Whether all of `bytes` are zero. Comparing memory does that faster than anything else.
pub(crate) fn is_zeros(bytes: &[u8]) -> bool {
    bytes
        .chunks(PIECE)
        .all(|piece| *piece == ZEROS[..piece.len()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_anywhere_is_seen() {
        for len in [0, 1, 2, 63, 4096, 5000] {
            let mut bytes = vec![0; len];
            assert!(is_zeros(&bytes));
            for at in 0..len {
                bytes[at] = 1;
                assert!(!is_zeros(&bytes), "{at} of {len}");
                bytes[at] = 0;
            }
        }
    }
}
