//! The binary: parses the command line, runs the command, and turns its outcome into an exit status.
//!
//! 0: done; 1: it failed; 2: the command line, a setting or an address cannot be used.

use std::io;
use std::process::ExitCode;

use ingle::cli::{self, Command};
use ingle::{commands, launcher};

fn main() -> ExitCode {
    let cli = match cli::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    if let Err(error) = launcher::hand_over(&cli.command) {
        commands::complain(&error);
        return ExitCode::FAILURE;
    }
    let outcome = match &cli.command {
        Command::Serve(args) => return commands::serve(args),
        Command::Run(args) => commands::run(args),
        Command::Convert(args) => commands::convert(args),
        Command::Bench(args) => commands::bench(args),
        Command::Models(args) => commands::models(args),
        Command::Perplexity(args) => commands::perplexity(args),
        Command::Check(args) => commands::check(args),
        Command::Doctor(args) => commands::doctor(args),
        Command::Register(args) => commands::register(args),
        Command::Embed(args) => commands::embed(args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has read enough, as `head` does.
        Err(error)
            if error.downcast_ref().is_some_and(|e: &io::Error| e.kind() == io::ErrorKind::BrokenPipe) =>
        {
            ExitCode::SUCCESS
        }
        Err(error) => {
            commands::complain(&error);
            ExitCode::FAILURE
        }
    }
}
