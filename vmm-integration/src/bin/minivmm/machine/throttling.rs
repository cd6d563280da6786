//! A guest that is slowed down for its migration, by the policy of `vmm_integration`.

use std::sync::Arc;

use vmm_integration::{AutoConverge, Throttle};

use super::Machine;

/// Slows a machine's processors down as the policy says; they run as they like again when this is dropped, however that comes about.
#[derive(Debug)]
pub(crate) struct Throttling {
    machine: Arc<Machine>,
}

impl Throttling {
    /// Of a machine whose processors run as they like.
    pub(crate) fn new(machine: &Arc<Machine>) -> Self {
        Self {
            machine: Arc::clone(machine),
        }
    }

    /// From now on it is as `policy` says: by processor where it is known what each writes, otherwise the same for all.
    pub(crate) fn follow(&mut self, policy: &AutoConverge) {
        let now = self.machine.throttles();
        let rates = self.machine.dirty_rates();
        self.machine.throttle(&each(policy, rates.as_deref(), &now));
    }
}

impl Drop for Throttling {
    fn drop(&mut self) {
        let none = vec![Throttle::NONE; self.machine.throttles().len()];
        self.machine.throttle(&none);
    }
}

/// The share of each processor, of which `rates` says what it writes with `now` in force.
fn each(policy: &AutoConverge, rates: Option<&[u64]>, now: &[Throttle]) -> Vec<Throttle> {
    match rates {
        // Rings in which nothing is do not say who it is that writes.
        Some(rates) if rates.iter().any(|&rate| rate > 0) => {
            let now: Vec<_> = rates.iter().copied().zip(now.iter().copied()).collect();
            policy.by_vcpu(&now)
        }
        _ => vec![policy.throttle(); now.len()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_integration::Round;

    fn policy() -> AutoConverge {
        let mut policy = AutoConverge::new();
        policy.after(Round {
            dirty_rate: 100,
            bandwidth: 100,
        });
        policy
    }

    #[test]
    fn who_writes_is_slowed_down_where_it_is_known_and_all_are_otherwise() {
        let (policy, now) = (policy(), [Throttle::NONE; 2]);
        let half = Throttle::percent(50);
        assert_eq!(each(&policy, None, &now), [half, half]);
        assert_eq!(each(&policy, Some(&[0, 0]), &now), [half, half]);
        let by_rate = each(&policy, Some(&[1000, 1]), &now);
        assert!(by_rate[0] >= half, "{by_rate:?}");
        assert_eq!(by_rate[1], Throttle::NONE);
    }

    #[test]
    fn a_policy_that_slows_nothing_down_lifts_what_is_in_force() {
        let now = [Throttle::percent(80), Throttle::NONE];
        for rates in [None, Some([3, 1000].as_slice()), Some(&[0, 0])] {
            assert_eq!(
                each(&AutoConverge::new(), rates, &now),
                [Throttle::NONE; 2],
                "{rates:?}"
            );
        }
    }
}
