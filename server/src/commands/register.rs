//! `ingle register --check`: whether routers can be reached, and whether they know a server.

use std::time::Duration;

use anyhow::{Context, bail};

use crate::{
    cli::RegisterArgs,
    register::{Announcement, Presence, Target},
};

/// Time a router gets to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Prints a line a router.
///
/// # Errors
/// If a router cannot be reached, or does not know the server that was named.
pub fn register(args: &RegisterArgs) -> anyhow::Result<()> {
    let targets = args
        .routers
        .iter()
        .map(|url| url.parse().with_context(|| url.clone()))
        .collect::<Result<Vec<Target>, _>>()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let client = reqwest::Client::builder().timeout(PATIENCE).build()?;
    let url = args.advertise_url.clone().unwrap_or_default();
    let me = Announcement::of_address(
        &url,
        args.instance_id.clone().unwrap_or_else(|| super::tier::default_instance(&url)),
    );
    let mut failed = false;
    for target in targets {
        let outcome = runtime.block_on(target.adapter(client.clone()).check(&me));
        let (fine, word) = match outcome {
            Ok(Presence::Known) => (true, "reachable, knows the server".to_owned()),
            Ok(Presence::Unknown) if args.advertise_url.is_none() => (true, "reachable".to_owned()),
            Ok(Presence::Unknown) => (false, "reachable, does not know the server".to_owned()),
            Err(error) => (false, error.to_string()),
        };
        failed |= !fine;
        super::say(&format!("{}  {word}", target.shown()))?;
    }
    if failed {
        bail!("not every router is as it should be");
    }
    Ok(())
}
