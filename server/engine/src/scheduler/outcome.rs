//! From a step's outcome to events.

use super::{
    BackendError, EngineError, Fault, FinishReason, RequestId, SampleResult, ScheduledSeq, Scheduler,
    SchedulerEvent, SeqOutput, StepOutput, StepPlan, TokenEvent,
};

impl Scheduler {
    /// Takes the outcome of `plan`, which must be the oldest step in flight, and returns what its requests are told.
    ///
    /// A failed step ends the requests in it; a fatal one ends all.
    pub fn update(
        &mut self,
        plan: &StepPlan,
        outcome: Result<StepOutput, BackendError>,
    ) -> Vec<SchedulerEvent> {
        assert_eq!(self.in_flight.pop_front(), Some(plan.step), "steps complete in order");
        let mut events = Vec::new();
        match outcome {
            Ok(output) if output.seqs.len() == plan.seqs.len() => {
                self.settle(plan);
                for (part, output) in plan.seqs.iter().zip(output.seqs) {
                    self.take_output(plan, part, output, &mut events);
                }
            }
            Ok(output) => {
                let why = format!("{} outputs for {} sequences", output.seqs.len(), plan.seqs.len());
                self.fail_step(plan, &why, &mut events);
            }
            Err(BackendError::Step(why)) => self.fail_step(plan, &why, &mut events),
            Err(BackendError::Fatal(_)) => {
                self.settle(plan);
                self.fail_all(&mut events);
            }
        }
        events
    }

    /// Ends every request, e.g. because the device is lost.
    pub fn fail_all(&mut self, events: &mut Vec<SchedulerEvent>) {
        while let Some((&request, _)) = self.groups.first_key_value() {
            self.fail_request(request, EngineError::Dead, events);
        }
    }

    /// Clears the marks of a step that is no longer in flight and frees what waited for it.
    fn settle(&mut self, plan: &StepPlan) {
        for part in &plan.seqs {
            if let Some(seq) = self.seqs.get_mut(&part.seq)
                && seq.last_step == Some(plan.step)
            {
                seq.last_step = None;
            }
        }
        while let Some(blocks) = self.fences.pop_complete(plan.step.0) {
            self.free(blocks);
        }
    }

    /// Ends the requests of the step, but those of whom it computed nothing but what follows an end.
    fn fail_step(&mut self, plan: &StepPlan, why: &str, events: &mut Vec<SchedulerEvent>) {
        self.settle(plan);
        let hit: Vec<RequestId> = plan
            .seqs
            .iter()
            .filter(|part| self.seqs.contains_key(&part.seq) || self.faults.has(Fault::FailInVain))
            .map(|part| part.request)
            .collect();
        for request in hit {
            self.fail_request(request, EngineError::Step(why.to_owned()), events);
        }
    }

    fn fail_request(&mut self, request: RequestId, error: EngineError, events: &mut Vec<SchedulerEvent>) {
        if self.groups.contains_key(&request) {
            self.remove_request(request);
            events.push(SchedulerEvent { request, event: TokenEvent::Failed(error) });
        }
    }

    fn take_output(
        &mut self,
        plan: &StepPlan,
        part: &ScheduledSeq,
        output: SeqOutput,
        events: &mut Vec<SchedulerEvent>,
    ) {
        // It may have been aborted meanwhile, or ended by the step before.
        let Some(seq) = self.seqs.get_mut(&part.seq) else { return };
        let request = part.request;
        if part.sample.is_some() {
            seq.unknown.pop_front();
        }
        if output.sampled == Some(SampleResult::NonFinite) {
            self.counters.non_finite += 1;
            if self.faults.has(Fault::FailWholeBatch) {
                plan.seqs
                    .iter()
                    .for_each(|p| self.fail_request(p.request, EngineError::NonFiniteLogits, events));
            }
            return self.fail_request(request, EngineError::NonFiniteLogits, events);
        }
        if let Some(SampleResult::Failed(why)) = output.sampled {
            return self.fail_request(request, EngineError::Step(why), events);
        }
        let start = seq.num_confirmed;
        seq.num_confirmed = part.end();
        if part.prompt_logprobs.is_some()
            && let Some(entries) = &mut seq.prompt_logprobs
        {
            if entries.is_empty() {
                entries.push(None); // nothing predicts the first token
            }
            entries.extend(output.prompt_logprobs.into_iter().map(Some));
            if part.end() >= part.req.get().prompt.len() {
                let entries = seq.prompt_logprobs.take().unwrap_or_default();
                events.push(SchedulerEvent { request, event: TokenEvent::PromptLogprobs(entries) });
            }
        }
        self.register_full_blocks(part.seq, start, part.end());
        match output.sampled {
            Some(SampleResult::Token { id, logprobs }) => {
                let event =
                    TokenEvent::Token { choice: part.sample.as_ref().map_or(0, |s| s.choice), id, logprobs };
                self.take_token(part, id, event, events);
            }
            _ if part.sample.is_some() => {
                let why = "the backend chose no token".to_owned();
                self.fail_request(request, EngineError::Step(why), events);
            }
            _ => self.finish_if_unsampled(part, events),
        }
    }

    /// A request for no answer token ends with its prompt.
    fn finish_if_unsampled(&mut self, part: &ScheduledSeq, events: &mut Vec<SchedulerEvent>) {
        if self
            .seqs
            .get(&part.seq)
            .is_some_and(|seq| seq.max_output == 0 && seq.num_confirmed == seq.num_tokens())
        {
            self.finish(part, FinishReason::Length, events);
        }
    }

    fn take_token(
        &mut self,
        part: &ScheduledSeq,
        id: u32,
        event: TokenEvent,
        events: &mut Vec<SchedulerEvent>,
    ) {
        let request = part.request;
        let Some(seq) = self.seqs.get_mut(&part.seq) else { return };
        let Some(group) = self.groups.get_mut(&request) else { return };
        group.usage.completion_tokens = group.usage.completion_tokens.saturating_add(1);
        let sampling = &part.req.get().sampling;
        let ends =
            !sampling.ignore_eos && self.eos_token_ids.contains(&id) || sampling.stop_token_ids.contains(&id);
        seq.output.push(id);
        let is_full = if self.faults.has(Fault::OneTokenMore) {
            seq.output.len() > seq.max_output
        } else {
            seq.output.len() >= seq.max_output
        };
        // While min_tokens bans end tokens none is chosen, unless the ban would have left nothing to choose from.
        if ends && seq.output.len() > sampling.min_tokens as usize {
            return self.finish(part, FinishReason::Stop(id), events);
        }
        if self.faults.has(Fault::DoubleEmit) && seq.output.len() % 7 == 0 {
            events.push(SchedulerEvent { request, event: event.clone() });
        }
        events.push(SchedulerEvent { request, event });
        if is_full {
            self.finish(part, FinishReason::Length, events);
        }
    }

    fn finish(&mut self, part: &ScheduledSeq, reason: FinishReason, events: &mut Vec<SchedulerEvent>) {
        let request = part.request;
        let Some(choice) = self.seqs.get(&part.seq).map(|seq| seq.rank.choice) else { return };
        self.remove_seq(part.seq);
        let Some(group) = self.groups.get_mut(&request) else { return };
        group.seqs.retain(|id| *id != part.seq);
        let event = TokenEvent::Finished { choice, reason, usage: group.usage };
        if group.seqs.is_empty() {
            self.groups.remove(&request);
        }
        events.push(SchedulerEvent { request, event });
    }
}
