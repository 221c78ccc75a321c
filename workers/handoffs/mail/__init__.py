"""What control workers do for mail: watch mailboxes, receive over SMTP, read attachments, send answers."""
