//! What comes back for a request.

use aha_core::tokenizer::SpecialTokens;

use super::*;
use crate::testing::byte_tokenizer;

#[tokio::test(flavor = "multi_thread")]
async fn a_group_comes_back_whole_scored_and_reproducible() {
    let mut server = Server::start(Tiny::Qwen2).await;
    let mut asked = request("group", 4, 20);
    asked.rewards = ["equation", "format"].map(reward).to_vec();
    asked.columns = r#"{"target": 3, "nums": [1, 2]}"#.to_owned();
    let completions = server.completions(asked.clone()).await;
    assert_eq!(completions.iter().map(|completion| completion.sample_index).collect::<Vec<_>>(), [0, 1, 2, 3]);
    for completion in &completions {
        assert_eq!((completion.prompt_id, completion.finish_reason()), (11, v1::FinishReason::Length));
        assert_eq!(completion.spans, [v1::Span { version: 0, num_tokens: 20 }]);
        assert_eq!(completion.text, byte_tokenizer().decode(&completion.token_ids, SpecialTokens::Skip).unwrap());
        let rewards: Vec<_> =
            completion.rewards.iter().map(|reward| (reward.function.as_str(), reward.outcome.as_str())).collect();
        assert_eq!(rewards, [("equation", "unparsable"), ("format", "wrong")]);

        let whole = [asked.token_ids.clone(), completion.token_ids.clone()].concat();
        let scored = server.score(whole).await.split_off(asked.token_ids.len() - 1);
        let close = scored.iter().zip(&completion.logprobs).all(|(scored, sampled)| (scored - sampled).abs() < 1e-4);
        assert!(close, "{scored:?} and {:?}", completion.logprobs);
    }
    assert_ne!(completions[0].token_ids, completions[1].token_ids);

    // Another generator is asked for the one sample that this one is said to have lost.
    let other = Server::start_with(Tiny::Qwen2, Duration::ZERO, |options| {
        options.generator.max_num_seqs = 1;
        options.generator.max_num_batched_tokens = 5;
    });
    let again = other.await.completions(v1::GenerateRequest { sample_indices: vec![2], ..asked }).await;
    assert_eq!(again, completions[2..3]);
}

/// Neighbours, small chunks and preemption must not change a bit of a completion.
#[tokio::test(flavor = "multi_thread")]
async fn completions_do_not_depend_on_what_else_runs() {
    // Whoever is computed again must count its tokens as before.
    let penalised = |id: &str| {
        let mut asked = request(id, 3, 60);
        let sampling = asked.sampling.as_mut().unwrap();
        (sampling.repetition_penalty, sampling.frequency_penalty) = (Some(1.3), 0.4);
        asked
    };
    let mut roomy = Server::start(Tiny::Llama).await;
    let alone = roomy.completions(penalised("alone")).await;

    let mut cramped = Server::start_with(Tiny::Llama, Duration::ZERO, |options| {
        options.generator.kv_cache_mib = 1;
        options.generator.max_num_batched_tokens = 16;
    })
    .await;
    let mut others = Vec::new();
    for index in 0..3 {
        let mut other = request(&format!("other {index}"), 16, 100);
        other.token_ids.extend([index, 7, 7]);
        other.seed = u64::from(index);
        others.push(cramped.generate(other).await.unwrap());
    }
    let crowded = cramped.completions(penalised("crowded")).await;
    assert_eq!(crowded, alone);
    for other in others {
        assert_eq!(collect(other).await.unwrap().len(), 16);
    }
    let status = cramped.status().await;
    assert!(status.preemptions > 0, "{status:?}");
    assert_eq!((status.used_blocks, status.running, status.waiting), (0, 0, 0), "{status:?}");
}

/// What is found in the cache is to the last bit what would be computed again.
#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_request_is_found_and_the_same() {
    for tiny in [Tiny::Qwen2, Tiny::Qwen3, Tiny::Llama] {
        let mut cold = Server::start_with(tiny, Duration::ZERO, |options| {
            options.generator.enable_prefix_caching = false;
        })
        .await;
        let mut server = Server::start(tiny).await;
        let mut asked = request("first", 1, 40);
        asked.token_ids.extend((0..50).map(|index| index * 11 % 256));
        let first = server.completions(asked.clone()).await;
        // 73 tokens of prompt are 4 blocks and a rest, and 112 computed ones are 7 blocks.
        let status = server.status().await;
        assert_eq!((status.prefix_cache_queries, status.prefix_cache_hits, status.cached_blocks), (73, 0, 7));
        asked.request_id = "again".to_owned();
        assert_eq!(server.completions(asked.clone()).await, first);
        let status = server.status().await;
        assert_eq!((status.prefix_cache_queries, status.prefix_cache_hits), (2 * 73, 64));
        assert_eq!((status.prompt_tokens, status.used_blocks), (73 + 9, 0));

        // A conversation goes on: its answer is found too.
        asked.token_ids.extend(&first[0].token_ids);
        asked.token_ids.extend([3, 1, 4]);
        asked.sample_indices = vec![0, 1, 2];
        let longer = server.completions(asked.clone()).await;
        assert_eq!(server.status().await.prefix_cache_hits, 64 + 3 * 112);
        assert_eq!(cold.completions(asked).await, longer);
        assert_eq!(cold.status().await.prefix_cache_queries, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn raw_and_prompt_logprobs_are_the_models_own_and_only_where_asked_for() {
    let mut server = Server::start(Tiny::Qwen3).await;
    let mut asked = request("raw", 3, 20);
    let sampling = asked.sampling.as_mut().unwrap();
    (sampling.temperature, sampling.top_k, sampling.repetition_penalty) = (0.7, 40, Some(1.5));
    let plain = server.completions(asked.clone()).await;
    let sampling = asked.sampling.as_mut().unwrap();
    (sampling.logprobs, sampling.prompt_logprobs) = (4, true);
    let completions = server.completions(asked.clone()).await;
    let prompt = server.score(asked.token_ids.clone()).await;
    assert_eq!(prompt.len(), asked.token_ids.len() - 1);
    for (plain, completion) in plain.into_iter().zip(completions) {
        let scored = server.score([asked.token_ids.clone(), completion.token_ids.clone()].concat()).await;
        assert_eq!(completion.raw_logprobs.len(), 20);
        for ((raw, sampled), scored) in
            completion.raw_logprobs.iter().zip(&completion.logprobs).zip(&scored[prompt.len()..])
        {
            assert!((raw.logprob - scored).abs() < 1e-4 && (sampled - scored).abs() > 1e-4, "{raw:?}, {scored}");
            assert!(raw.top_logprobs.len() == 4 && raw.top_logprobs.is_sorted_by(|a, b| a >= b), "{raw:?}");
        }
        assert_eq!(completion.prompt_logprobs, prompt);
        let bare = v1::Completion { raw_logprobs: Vec::new(), prompt_logprobs: Vec::new(), ..completion };
        assert_eq!(plain, bare, "what is reported changes nothing else");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_allowed_tokens_are_sampled_and_bad_ones_never() {
    let mut server = Server::start(Tiny::Qwen2).await;
    let mut asked = request("letters", 2, 30);
    let sampling = asked.sampling.as_mut().unwrap();
    // Not in order, and one of them twice.
    sampling.allowed_token_ids = b"edcbaa".iter().map(|&byte| u32::from(byte)).collect();
    sampling.bad_token_ids = vec![u32::from(b'c')];
    for completion in server.completions(asked).await {
        let letters: std::collections::BTreeSet<char> = completion.text.chars().collect();
        assert!(letters.iter().all(|letter| "abde".contains(*letter)), "{}", completion.text);
        assert!(completion.text.len() == 30 && letters.len() > 1, "{}", completion.text);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_ends_a_completion_with_the_token_that_completes_it() {
    let mut server = Server::start(Tiny::Qwen3).await;
    let whole = server.completions(request("whole", 1, 80)).await.remove(0);
    // Every token is a byte, so two characters are two tokens.
    let ascii = |index: &usize| whole.token_ids[*index..][..2].iter().all(|token| (33..127).contains(token));
    let end = 2 + (10..78).find(ascii).expect("two printable characters in a row");
    let stop: String = whole.token_ids[end - 2..end].iter().map(|&token| char::from(token as u8)).collect();
    assert_eq!(whole.text.matches(&stop).count(), 1, "the string must be found where it is looked for");

    let mut asked = request("stopped", 1, 80);
    asked.sampling.as_mut().unwrap().stop = vec!["not there".to_owned(), stop.clone()];
    let stopped = server.completions(asked.clone()).await.remove(0);
    assert_eq!(stopped.finish_reason(), v1::FinishReason::Stop);
    assert_eq!((&stopped.token_ids[..], stopped.logprobs.len()), (&whole.token_ids[..end], end));
    assert_eq!(stopped.spans, [v1::Span { version: 0, num_tokens: end as u32 }]);
    assert!(stopped.text.ends_with(&stop));

    asked.sampling.as_mut().unwrap().min_tokens = end as u32 + 1;
    assert_eq!(server.completions(asked).await[0].token_ids, whole.token_ids);
    server.wait_until(|status| status.used_blocks == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_token_ends_a_completion_after_min_tokens() {
    let mut server = Server::start(Tiny::Qwen2).await;
    let mut asked = request("whole", 1, 40);
    asked.sampling.as_mut().unwrap().ignore_eos = false;
    let whole = server.completions(asked.clone()).await.remove(0);
    let end = 1 + (5..40).find(|&index| !whole.token_ids[..index].contains(&whole.token_ids[index])).unwrap();
    asked.sampling.as_mut().unwrap().stop_token_ids = vec![whole.token_ids[end - 1]];
    let stopped = server.completions(asked.clone()).await.remove(0);
    assert_eq!((stopped.finish_reason(), &stopped.token_ids[..]), (v1::FinishReason::Stop, &whole.token_ids[..end]));
    asked.sampling.as_mut().unwrap().min_tokens = end as u32 + 3;
    let longer = server.completions(asked).await.remove(0);
    assert!(longer.token_ids.len() >= end + 3, "{longer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_needs_a_deadline_and_ends_with_it() {
    let mut server = Server::start(Tiny::Qwen2).await;
    let status = server.client.generate(request("no deadline", 1, 8)).await.unwrap_err();
    check_status(&status, Code::InvalidArgument, "grpc-timeout: ");

    let mut call = Request::new(request("short", 2, ENDLESS));
    call.set_timeout(Duration::from_millis(200));
    let ended = match server.client.generate(call).await {
        Ok(stream) => collect(stream.into_inner()).await.unwrap_err(),
        Err(status) => status,
    };
    check_status(&ended, Code::DeadlineExceeded, "");
    let status = server.wait_until(|status| status.used_blocks == 0 && status.waiting == 0).await;
    assert!(status.generation_tokens < 2 * u64::from(ENDLESS));
}
