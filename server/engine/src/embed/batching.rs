//! The queue of an encoder: requests of many inputs each, cut into batches. Pure: no clock, no thread, no tensor.

use std::collections::{BTreeMap, VecDeque};

use ingle_models::encoder::EncoderBatch;

use super::EncoderInput;

/// Number of a request.
pub(super) type RequestKey = u64;

/// A request's inputs that are not yet computed.
#[derive(Debug)]
struct Pending {
    key: RequestKey,
    /// With each input its place in the request.
    inputs: VecDeque<(usize, EncoderInput)>,
}

/// An input on its way through the model.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) key: RequestKey,
    /// Its place in its request.
    pub(super) place: usize,
    pub(super) input: EncoderInput,
}

/// Requests in the order of their turns.
#[derive(Debug, Default)]
pub(super) struct BatchQueue {
    requests: VecDeque<Pending>,
    inputs: usize,
    tokens: usize,
}

impl BatchQueue {
    pub(super) fn is_empty(&self) -> bool {
        self.inputs == 0
    }

    /// Inputs that wait.
    pub(super) fn num_inputs(&self) -> usize {
        self.inputs
    }

    /// Tokens that wait.
    pub(super) fn num_tokens(&self) -> usize {
        self.tokens
    }

    /// Adds a request behind the others.
    pub(super) fn push(&mut self, key: RequestKey, inputs: Vec<EncoderInput>) {
        self.inputs += inputs.len();
        self.tokens += inputs.iter().map(|input| input.ids.len()).sum::<usize>();
        self.requests.push_back(Pending { key, inputs: inputs.into_iter().enumerate().collect() });
    }

    /// Forgets the requests for which `gone` holds.
    pub(super) fn retain(&mut self, mut gone: impl FnMut(RequestKey) -> bool) {
        let (mut inputs, mut tokens) = (0, 0);
        self.requests.retain(|request| {
            let keep = !gone(request.key);
            if !keep {
                inputs += request.inputs.len();
                tokens += request.inputs.iter().map(|(_, input)| input.ids.len()).sum::<usize>();
            }
            keep
        });
        self.inputs -= inputs;
        self.tokens -= tokens;
    }

    /// Takes the next batch: one input of each request in turn, up to `budget` tokens and at least one input, longest
    /// first. The next batch begins where this one ends.
    pub(super) fn cut(&mut self, budget: usize) -> Vec<Job> {
        let mut jobs = Vec::new();
        let mut tokens = 0_usize;
        while let Some(mut request) = self.requests.pop_front() {
            let len = request.inputs.front().map_or(0, |(_, input)| input.ids.len());
            if !jobs.is_empty() && tokens.saturating_add(len) > budget {
                self.requests.push_front(request);
                break;
            }
            if let Some((place, input)) = request.inputs.pop_front() {
                tokens += len;
                self.inputs -= 1;
                jobs.push(Job { key: request.key, place, input });
            }
            if !request.inputs.is_empty() {
                self.requests.push_back(request);
            }
        }
        self.tokens -= tokens;
        // Long sequences first: the last pieces of work are small, and no thread waits long for another.
        jobs.sort_by_key(|job| std::cmp::Reverse(job.input.ids.len()));
        jobs
    }
}

/// `jobs` as the model wants them.
pub(super) fn ragged<'a>(jobs: impl IntoIterator<Item = &'a Job>) -> EncoderBatch {
    let mut batch = EncoderBatch { cu_seqlens: vec![0], ..EncoderBatch::default() };
    for Job { input, .. } in jobs {
        batch.input_ids.extend_from_slice(&input.ids);
        let types = input.type_ids.iter().map(|id| u32::from(*id)).chain(std::iter::repeat(0));
        batch.token_type_ids.extend(types.take(input.ids.len()));
        // The queue holds fewer tokens than 32 bits count.
        batch.cu_seqlens.push(u32::try_from(batch.input_ids.len()).unwrap_or(u32::MAX));
    }
    batch
}

/// The jobs by request, each with its row in the batch.
pub(super) fn by_request(jobs: &[Job]) -> BTreeMap<RequestKey, Vec<(usize, usize)>> {
    let mut requests: BTreeMap<RequestKey, Vec<(usize, usize)>> = BTreeMap::new();
    for (row, job) in jobs.iter().enumerate() {
        requests.entry(job.key).or_default().push((job.place, row));
    }
    requests
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn input(len: usize) -> EncoderInput {
        EncoderInput { ids: vec![7; len], type_ids: Vec::new() }
    }

    #[test]
    fn a_single_query_is_in_the_first_batch_of_a_long_job() {
        let mut queue = BatchQueue::default();
        queue.push(0, (0..1000).map(|_| input(10)).collect());
        queue.push(1, vec![input(10)]);
        let jobs = queue.cut(40);
        assert_eq!(jobs.len(), 4);
        assert!(jobs.iter().any(|job| job.key == 1));
        assert_eq!((queue.num_inputs(), queue.num_tokens()), (997, 9970));
    }

    #[test]
    fn an_input_over_the_budget_goes_alone() {
        let mut queue = BatchQueue::default();
        queue.push(0, vec![input(100), input(1)]);
        assert_eq!(queue.cut(10).len(), 1);
        assert_eq!(queue.cut(10)[0].place, 1);
        assert!(queue.is_empty() && queue.cut(10).is_empty());
    }

    #[test]
    fn segments_are_zero_where_none_are_given() {
        let with = EncoderInput { ids: vec![1, 2, 3], type_ids: vec![0, 1, 1] };
        let jobs = [input(2), with].map(|input| Job { key: 0, place: 0, input });
        let batch = ragged(&jobs);
        assert_eq!(batch.cu_seqlens, [0, 2, 5]);
        assert_eq!(batch.token_type_ids, [0, 0, 0, 1, 1]);
    }

    proptest! {
        #[test]
        fn every_input_is_cut_once_within_the_budget(
            requests in proptest::collection::vec(proptest::collection::vec(1_usize..50, 0..20), 0..12),
            budget in 1_usize..200,
            gone in proptest::collection::vec(any::<bool>(), 12),
        ) {
            let mut queue = BatchQueue::default();
            for (key, lens) in requests.iter().enumerate() {
                queue.push(key as u64, lens.iter().map(|len| input(*len)).collect());
            }
            queue.retain(|key| gone[key as usize]);
            let mut seen = std::collections::BTreeSet::new();
            while !queue.is_empty() {
                let (before, jobs) = (queue.num_inputs(), queue.cut(budget));
                prop_assert!(!jobs.is_empty());
                prop_assert_eq!(queue.num_inputs() + jobs.len(), before);
                let tokens: usize = jobs.iter().map(|job| job.input.ids.len()).sum();
                prop_assert!(tokens <= budget || jobs.len() == 1);
                prop_assert!(jobs.is_sorted_by(|a, b| a.input.ids.len() >= b.input.ids.len()));
                for job in jobs {
                    prop_assert_eq!(requests[job.key as usize][job.place], job.input.ids.len());
                    prop_assert!(seen.insert((job.key, job.place)));
                }
            }
            prop_assert_eq!(queue.num_tokens(), 0);
            let wanted: usize = requests.iter().zip(&gone).filter(|(_, gone)| !**gone).map(|(lens, _)| lens.len()).sum();
            prop_assert_eq!(seen.len(), wanted);
        }
    }
}
