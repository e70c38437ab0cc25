//! Starts the server, and runs the client in Python, which checks the promises of the layer.

use grpc::{Bank, Error, idempotency, run_client, serve};

#[tokio::main]
async fn main() -> Result<(), Error> {
    let server = serve(idempotency(), Bank::default()).await?;
    let (output, is_as_promised) = tokio::task::spawn_blocking(move || run_client(server)).await??;
    print!("{output}");
    if is_as_promised {
        Ok(())
    } else {
        Err("the outcome is not as promised".into())
    }
}
